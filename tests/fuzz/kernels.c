/* Every entry point of _kernels.c on hostile buffers and numbers, led by coverage (libFuzzer), under the address and
 * undefined-behaviour sanitizers.  `python tests/fuzz/kernels.py` builds and runs it.
 *
 * An input is numbers, then bytes.  Each buffer is memory of its own of exactly its size, so that a step past its end
 * is seen; sizes mostly fit each other, since a call whose sizes are all wrong ends at the first check.
 * What splits is joined again and must give the same bytes.
 */
#include "../../deltackpt/_kernels.c"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#define N_LOGS 301
#define N_MAX 700 /* elements: more than a block of any kernel */

static const uint8_t *at;
static size_t left;
static uint8_t *given[64]; /* memory of this input */
static size_t n_given;
static int64_t logs[N_LOGS];

static unsigned byte(void)
{
    return left ? (left--, *at++) : 0;
}

/* Mostly n; else a little off. */
static size_t about(size_t n)
{
    int off = (int)byte() - 236;
    if (off < 0)
        return n;
    off -= 9;
    return off < 0 && (size_t)-off > n ? 0 : n + (size_t)off;
}

/* A number that no caller may give, now and then. */
static long number(long usual)
{
    static const long odd[] = {-1, 0, 1, 3, 9, 255, 1L << 31, (1L << 32) - 1, 1L << 32, -(1L << 62), LONG_MAX, LONG_MIN};
    unsigned which = byte();
    return which < 200 ? usual : odd[which % (sizeof odd / sizeof *odd)];
}

static uint8_t *memory(size_t size)
{
    uint8_t *data = malloc(size ? size : 1);
    size_t some = size < left ? size : left;
    if (!data || n_given == sizeof given / sizeof *given)
        abort();
    memset(data, 0, size);
    memcpy(data, at, some);
    at += some;
    left -= some;
    return given[n_given++] = data;
}

static PyObject *view(uint8_t *data, size_t size)
{
    PyObject *made = PyMemoryView_FromMemory((char *)data, (Py_ssize_t)size, PyBUF_WRITE);
    if (!made)
        abort();
    return made;
}

static PyObject *buffer(size_t size)
{
    size = about(size);
    return view(memory(size), size);
}

/* Calls, and drops the arguments; 1 if it was done. */
static int call(PyCFunction function, PyObject *args)
{
    PyObject *found;
    if (!args)
        abort();
    found = function(NULL, args);
    Py_DECREF(args);
    if (!found) {
        if (!PyErr_ExceptionMatches(PyExc_ValueError) && !PyErr_ExceptionMatches(PyExc_TypeError) &&
            !PyErr_ExceptionMatches(PyExc_OverflowError)) {
            PyErr_Print();
            abort();
        }
        PyErr_Clear();
        return 0;
    }
    Py_DECREF(found);
    return 1;
}

/* What all calls on elements are about. */
static long width, wide;
static int map, cast, bitmap;
static float scale;
static size_t n;

static void choose(void)
{
    static const float scales[] = {1.0f, 0.5f, 1.99f, 0.02f, NAN, 0.0f, -1.0f, INFINITY};
    unsigned which = byte();
    width = 1L << (which & 3);
    cast = byte() % 6;
    cast = cast > 3 ? 0 : cast;
    map = (int)number(which >> 2 & 1 ? (which >> 3) % 3 : 0);
    bitmap = which >> 5 & 1;
    scale = which >> 6 ? scales[byte() % 8] : 1.0f;
    if (cast == 1 || cast == 2)
        width = 2, wide = 4;
    else if (cast == 3)
        width = 4, wide = 8;
    else
        wide = width;
    n = (byte() | (size_t)byte() << 8) % N_MAX;
}

static void planes_and_back(void)
{
    size_t size = n * (size_t)width, i;
    uint8_t *data = memory(size), *planes = memory(size), *back = memory(size);
    if (!call(py_split_planes, Py_BuildValue("NNli", view(data, size), view(planes, size), width, bitmap)) ||
        !call(py_join_planes, Py_BuildValue("NNli", view(planes, size), view(back, size), width, bitmap)))
        abort();
    for (i = 0; i < size; i++)
        if (data[i] != back[i])
            abort();
}

static void sparse_and_back(void)
{
    size_t size = n * (size_t)width, room = bitmap ? (n + 7) / 8 : n + n / 255 + 1, changed = 0, i, j;
    uint8_t *data = memory(size), *base = memory(size), *places = memory(room), *packed, *back = memory(size);
    PyObject *args, *found;
    for (i = 0; i < n; i++) {
        int differs = 0;
        for (j = 0; j < (size_t)width; j++)
            differs |= data[i * (size_t)width + j] != base[i * (size_t)width + j];
        changed += (size_t)differs;
    }
    packed = memory(changed * (size_t)width);
    args = Py_BuildValue("NNNNliii", view(data, size), view(base, size), view(places, room),
                         view(packed, changed * (size_t)width), width, (int)((unsigned)map % 3), 0, bitmap);
    found = py_sparse_take(NULL, args);
    Py_DECREF(args);
    if (!found)
        abort();
    room = PyLong_AsSize_t(found);
    Py_DECREF(found);
    if (!call(py_sparse_put, Py_BuildValue("NNNNliii", view(base, size), view(back, size), view(places, room),
                                           view(packed, changed * (size_t)width), width, (int)((unsigned)map % 3), 0,
                                           bitmap)) ||
        memcmp(data, back, size))
        abort();
}

/* Classes {length: elements} that add up to n, mostly, and planes that fit them. */
static PyObject *classes_of(PyObject **planes)
{
    PyObject *of = PyDict_New();
    size_t n_classes = byte() % 6, sizes[64], n_sizes = 0, sum = 0, c, l, length = 0;
    if (n_classes > 1)
        sizes[n_sizes++] = digits_size(n_classes > N_CLASSES_MAX ? N_CLASSES_MAX : n_classes, n);
    for (c = 0; of && c < n_classes; c++) {
        size_t count = c + 1 == n_classes ? n - sum : (n - sum) * byte() / 256;
        PyObject *key = PyLong_FromLong(number((long)length)), *value = PyLong_FromLong(number((long)count));
        if (!key || !value || PyDict_SetItem(of, key, value) < 0)
            abort();
        Py_DECREF(key);
        Py_DECREF(value);
        for (l = 0; l < length && n_sizes < 40; l++)
            sizes[n_sizes++] = count;
        sum += count;
        length += 1 + byte() % 2;
    }
    *planes = PyTuple_New((Py_ssize_t)n_sizes);
    for (c = 0; *planes && c < n_sizes; c++) {
        PyObject *plane = byte() % 8 ? buffer(sizes[c]) : (Py_INCREF(Py_None), Py_None);
        PyTuple_SetItem(*planes, (Py_ssize_t)c, plane);
    }
    return of;
}

static PyObject *group_item(void)
{
    PyObject *data = buffer(n * (size_t)width), *base = buffer(n * (size_t)wide);
    PyObject *out = buffer(n * (size_t)width + n / 8 + 8);
    return Py_BuildValue("NNNliifl", data, base, out, width, map, cast, scale, number((long)n / 4));
}

static PyObject *ungroup_item(void)
{
    PyObject *planes, *of = classes_of(&planes), *base = buffer(n * (size_t)wide), *out = buffer(n * (size_t)width);
    return Py_BuildValue("NNNliifN", planes, base, out, width, map, cast, scale, of);
}

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    size_t i;
    (void)argc;
    (void)argv;
    Py_InitializeEx(0);
    for (i = 1; i < N_LOGS; i++)
        logs[i] = (int64_t)(log2((double)i) * 65536.0);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    PyObject *table;
    size_t total;
    unsigned which;
    at = data;
    left = size;
    n_given = 0;
    which = byte() % 14;
    choose();
    total = n * (size_t)width;
    table = view((uint8_t *)logs, sizeof logs);
    switch (which) {
    case 0: {
        PyObject *some = buffer(n * 8), *ends = buffer(8 * (byte() + 1u));
        call(py_cut, Py_BuildValue("NNlllL", some, ends, number(2L << byte() % 3), number(byte()), number(64 + byte()),
                                   (long long)number(1L << byte() % 33)));
        break;
    }
    case 1:
        call(py_split_planes, Py_BuildValue("NNli", buffer(total), buffer(total), number(width), bitmap));
        break;
    case 2:
        call(py_join_planes, Py_BuildValue("NNli", buffer(total), buffer(total), number(width), bitmap));
        break;
    case 3:
        call(py_entropies, Py_BuildValue("(NN)Ol", buffer(total), buffer(n), table, number(byte())));
        break;
    case 4:
        call(py_are_equal, Py_BuildValue("(NN)(NN)", buffer(n), buffer(n), buffer(total), buffer(total)));
        break;
    case 5:
        call(py_move, Py_BuildValue("((NlN)(NlN))", buffer(n), number(0), buffer(n / 2), buffer(total),
                                    number((long)n / 2), buffer(total - n / 2 % (total + 1))));
        break;
    case 6:
        call(py_split_all, Py_BuildValue("((NNli)(NNli))Ol", buffer(total), buffer(total), width, bitmap, buffer(total),
                                         buffer(total), number(width), bitmap, table, number(byte())));
        break;
    case 7:
        call(py_delta_group, Py_BuildValue("(NN)Ol", group_item(), group_item(), table, number(1 + byte())));
        break;
    case 8:
        call(py_delta_ungroup, Py_BuildValue("((N))", ungroup_item()));
        break;
    case 9:
        call(py_delta_ungroup, Py_BuildValue("((NN))", ungroup_item(), ungroup_item()));
        break;
    case 10: {
        PyObject *one = buffer(total), *base = buffer(n * (size_t)wide);
        PyObject *places = buffer(bitmap ? (n + 7) / 8 : n + n / 255), *packed = buffer(byte() * (size_t)width);
        call(py_sparse_take, Py_BuildValue("NNNNliii", one, base, places, packed, width, map, cast, bitmap));
        break;
    }
    case 11: {
        PyObject *base = buffer(n * (size_t)wide), *out = buffer(total);
        PyObject *places = buffer(bitmap ? (n + 7) / 8 : byte()), *packed = buffer(byte() * (size_t)width);
        call(py_sparse_put, Py_BuildValue("NNNNliii", base, out, places, packed, width, map, cast, bitmap));
        break;
    }
    case 12:
        planes_and_back();
        break;
    default:
        sparse_and_back();
    }
    Py_DECREF(table);
    while (n_given)
        free(given[--n_given]);
    return 0;
}

#ifdef WITHOUT_LIBFUZZER /* each file that is named, once */
int main(int argc, char **argv)
{
    int i;
    LLVMFuzzerInitialize(&argc, &argv);
    for (i = 1; i < argc; i++) {
        static uint8_t data[1 << 16];
        FILE *file = fopen(argv[i], "rb");
        size_t size;
        if (!file)
            return 1;
        size = fread(data, 1, sizeof data, file);
        fclose(file);
        LLVMFuzzerTestOneInput(data, size);
    }
    printf("%d inputs\n", argc - 1);
    return 0;
}
#endif
