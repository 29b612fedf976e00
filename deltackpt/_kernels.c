/* The arithmetic of deltackpt on plain byte buffers, as a CPython extension (limited API, Python >= 3.11).
 *
 * Owns   the compiled twin of every kernel in kernels.py and differences.py, equal to the NumPy one bit for bit.
 * Never  keeps state, reads a file, or touches a Python object while the GIL is released.
 *
 * Plain C, no intrinsics: loops are written so that a compiler vectorises them, and where it can, gcc builds each
 * hot function three times and the loader picks one (target_clones).  Pointers may be unaligned: memcpy loads.
 * kernels.py checks arguments first and words the errors; the checks here only keep every access in bounds.
 */
#define PY_SSIZE_T_CLEAN
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030b0000
#endif
#include <Python.h>
#include <float.h>
#include <stdint.h>
#include <string.h>

/* target_clones needs ifunc (glibc on Linux) and a compiler that knows the x86-64 levels (gcc 12). */
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define HAVE_CLONES 1
#endif
#endif
#ifdef HAVE_CLONES
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

/* A loop is written once with the element size as a parameter; inlining turns that into a constant. */
#if defined(__GNUC__)
#define TEMPLATE static inline __attribute__((always_inline))
#else
#define TEMPLATE static inline
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
#define LE16(v) __builtin_bswap16(v)
#define LE32(v) __builtin_bswap32(v)
#define LE64(v) __builtin_bswap64(v)
#else
#define LE16(v) (v)
#define LE32(v) (v)
#define LE64(v) (v)
#endif

TEMPLATE uint16_t load16(const uint8_t *p)
{
    uint16_t v;
    memcpy(&v, p, 2);
    return LE16(v);
}

TEMPLATE uint32_t load32(const uint8_t *p)
{
    uint32_t v;
    memcpy(&v, p, 4);
    return LE32(v);
}

TEMPLATE uint64_t load64(const uint8_t *p)
{
    uint64_t v;
    memcpy(&v, p, 8);
    return LE64(v);
}

TEMPLATE void store16(uint8_t *p, uint16_t v)
{
    v = LE16(v);
    memcpy(p, &v, 2);
}

TEMPLATE void store32(uint8_t *p, uint32_t v)
{
    v = LE32(v);
    memcpy(p, &v, 4);
}

TEMPLATE void store64(uint8_t *p, uint64_t v)
{
    v = LE64(v);
    memcpy(p, &v, 8);
}

TEMPLATE uint32_t rotl32(uint32_t v, int n)
{
    return v << n | v >> (32 - n);
}

/* ---- cut: content-defined chunk ends -------------------------------------------------------------------------- */

/* Frozen: other constants are other boundaries, and new saves would stop meeting old chunks.  Why these: kernels.py. */
#define CUT_C1 UINT32_C(0x9E3779B1)
#define CUT_C2 UINT32_C(0x85EBCA77)
#define CUT_FOLD UINT32_C(0xC2B2AE3D)
#define CUT_K UINT32_C(0xA5C3965A)
#define CUT_BLOCK 512 /* words tested before one branch: 2 KiB of hashes stay in L1 */

/* Element at p as the 32-bit word that is hashed. */
TEMPLATE uint32_t cut_word(const uint8_t *p, size_t align)
{
    uint64_t v;
    if (align == 2)
        return load16(p);
    if (align == 4)
        return load32(p);
    v = load64(p);
    return (uint32_t)v + (uint32_t)(v >> 32) * CUT_FOLD;
}

/* a[i] and h[i] of kernels.cut. */
TEMPLATE uint32_t cut_pair(uint32_t word, uint32_t before)
{
    return word * CUT_C1 + rotl32(before, 11);
}

TEMPLATE uint32_t cut_hash(uint32_t pair, uint32_t pair_2_before)
{
    return ((pair ^ rotl32(pair_2_before, 15)) * CUT_C2) ^ CUT_K;
}

/* Hash at element i, elements before the data being 0. */
TEMPLATE uint32_t cut_hash_at(const uint8_t *data, size_t i, size_t align)
{
    uint32_t x[4];
    size_t back;
    for (back = 0; back < 4; back++)
        x[back] = i >= back ? cut_word(data + (i - back) * align, align) : 0;
    return cut_hash(cut_pair(x[0], x[1]), cut_pair(x[2], x[3]));
}

/* First i in [lo, hi) whose hash is under the threshold, else hi.  data holds at least hi elements. */
TEMPLATE size_t cut_find(const uint8_t *data, size_t lo, size_t hi, uint32_t threshold, size_t align)
{
    uint32_t pair[CUT_BLOCK + 2];
    size_t i = lo, j, end;
    while (i < hi) {
        if (i >= 3 && hi - i >= CUT_BLOCK) {
            const uint8_t *first = data + (i - 2) * align;
            uint32_t any = 0;
            for (j = 0; j < CUT_BLOCK + 2; j++)
                pair[j] = cut_pair(cut_word(first + j * align, align), cut_word(first + j * align - align, align));
            for (j = 0; j < CUT_BLOCK; j++)
                any |= cut_hash(pair[j + 2], pair[j]) < threshold;
            if (!any) {
                i += CUT_BLOCK;
                continue;
            }
        }
        /* A block with a hit, the first three elements, or what is left at the end. */
        end = hi - i < CUT_BLOCK ? hi : i + CUT_BLOCK;
        for (; i < end; i++)
            if (cut_hash_at(data, i, align) < threshold)
                return i;
    }
    return hi;
}

/* Writes the end offsets to ends and returns how many; n_ends_max + 1 if they do not fit.
 * min_n and max_n are elements, 1 <= min_n <= max_n. */
TEMPLATE size_t cut_all(const uint8_t *data, size_t size, size_t min_n, size_t max_n, uint32_t threshold,
                        int64_t *ends, size_t n_ends_max, size_t align)
{
    size_t n = size / align, start = 0, n_ends = 0;
    while (start * align < size) {
        size_t left = n - start, stop, hit, end_offset = size;
        if (left >= min_n) {
            stop = start + (left < max_n ? left : max_n);
            hit = cut_find(data, start + min_n - 1, stop, threshold, align);
            if (hit < stop)
                end_offset = (hit + 1) * align;
            else if (left >= max_n)
                end_offset = stop * align;
        }
        if (n_ends == n_ends_max)
            return n_ends_max + 1;
        ends[n_ends++] = (int64_t)end_offset;
        if (end_offset == size)
            break; /* also when a tail shorter than an element is in it */
        start = end_offset / align;
    }
    return n_ends;
}

#define CUT(ALIGN)                                                                                                 \
    CLONES static size_t cut_##ALIGN(const uint8_t *data, size_t size, size_t min_n, size_t max_n,                 \
                                     uint32_t threshold, int64_t *ends, size_t n_ends_max)                         \
    {                                                                                                              \
        return cut_all(data, size, min_n, max_n, threshold, ends, n_ends_max, ALIGN);                              \
    }
CUT(2)
CUT(4)
CUT(8)

static PyObject *py_cut(PyObject *self, PyObject *args)
{
    Py_buffer data, ends;
    Py_ssize_t align, min_size, max_size;
    long long threshold;
    size_t min_n = 0, max_n = 0, n_ends_max, n_ends = 0;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*w*nnnL:cut", &data, &ends, &align, &min_size, &max_size, &threshold))
        return NULL;
    n_ends_max = (size_t)ends.len / sizeof(int64_t);
    if ((align == 2 || align == 4 || align == 8) && min_size >= 1 && max_size >= 1) {
        min_n = (size_t)(min_size / align) + (min_size % align != 0);
        max_n = (size_t)(max_size / align);
    }
    if (min_n < 1 || min_n > max_n || threshold < 0 || threshold > (long long)UINT32_MAX ||
        (uintptr_t)ends.buf % sizeof(int64_t) != 0) {
        PyErr_SetString(PyExc_ValueError, "cut: align, sizes, threshold or alignment of ends out of range");
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS
    if (align == 2)
        n_ends = cut_2(data.buf, (size_t)data.len, min_n, max_n, (uint32_t)threshold, ends.buf, n_ends_max);
    else if (align == 4)
        n_ends = cut_4(data.buf, (size_t)data.len, min_n, max_n, (uint32_t)threshold, ends.buf, n_ends_max);
    else
        n_ends = cut_8(data.buf, (size_t)data.len, min_n, max_n, (uint32_t)threshold, ends.buf, n_ends_max);
    Py_END_ALLOW_THREADS
    if (n_ends > n_ends_max)
        PyErr_SetString(PyExc_ValueError, "cut: ends is too short");
done:
    PyBuffer_Release(&data);
    PyBuffer_Release(&ends);
    return PyErr_Occurred() ? NULL : PyLong_FromSize_t(n_ends);
}

/* ---- byte planes ---------------------------------------------------------------------------------------------- */

/* Elements a block: rotated in L1, then each plane takes its byte in one strided sweep, which vectorises for every
 * width; the direct form (all planes of one element at a time) is 4x slower for 8-byte elements. */
#define PLANE_BLOCK 1024

/* dst[i] = src[i] rotated left by one bit, n little-endian elements; dst may be src. */
TEMPLATE void rotate_left(const uint8_t *src, uint8_t *dst, size_t n, size_t width)
{
    size_t i;
    if (width == 1)
        for (i = 0; i < n; i++)
            dst[i] = (uint8_t)(src[i] << 1 | src[i] >> 7);
    else if (width == 2)
        for (i = 0; i < n; i++) {
            uint16_t v = load16(src + 2 * i);
            store16(dst + 2 * i, (uint16_t)(v << 1 | v >> 15));
        }
    else if (width == 4)
        for (i = 0; i < n; i++) {
            uint32_t v = load32(src + 4 * i);
            store32(dst + 4 * i, v << 1 | v >> 31);
        }
    else
        for (i = 0; i < n; i++) {
            uint64_t v = load64(src + 8 * i);
            store64(dst + 8 * i, v << 1 | v >> 63);
        }
}

TEMPLATE void rotate_right_in_place(uint8_t *p, size_t n, size_t width)
{
    size_t i;
    if (width == 1)
        for (i = 0; i < n; i++)
            p[i] = (uint8_t)(p[i] >> 1 | p[i] << 7);
    else if (width == 2)
        for (i = 0; i < n; i++) {
            uint16_t v = load16(p + 2 * i);
            store16(p + 2 * i, (uint16_t)(v >> 1 | v << 15));
        }
    else if (width == 4)
        for (i = 0; i < n; i++) {
            uint32_t v = load32(p + 4 * i);
            store32(p + 4 * i, v >> 1 | v << 31);
        }
    else
        for (i = 0; i < n; i++) {
            uint64_t v = load64(p + 8 * i);
            store64(p + 8 * i, v >> 1 | v << 63);
        }
}

/* Plane k of planes = byte k of every element of data, planes one after another; n * width bytes each, no overlap. */
TEMPLATE void split(const uint8_t *restrict data, uint8_t *restrict planes, size_t n, int rotate, size_t width)
{
    uint8_t rotated[PLANE_BLOCK * 8];
    size_t i, j, k;
    for (i = 0; i < n; i += PLANE_BLOCK) {
        size_t m = n - i < PLANE_BLOCK ? n - i : PLANE_BLOCK;
        const uint8_t *src = data + i * width;
        if (rotate) {
            rotate_left(src, rotated, m, width);
            src = rotated;
        }
        for (k = 0; k < width; k++) {
            uint8_t *plane = planes + k * n + i;
            for (j = 0; j < m; j++)
                plane[j] = src[j * width + k];
        }
    }
}

/* The inverse of split. */
TEMPLATE void join(const uint8_t *restrict planes, uint8_t *restrict out, size_t n, int rotate, size_t width)
{
    size_t i, j, k;
    for (i = 0; i < n; i += PLANE_BLOCK) {
        size_t m = n - i < PLANE_BLOCK ? n - i : PLANE_BLOCK;
        uint8_t *dst = out + i * width;
        for (j = 0; j < m; j++)
            for (k = 0; k < width; k++)
                dst[j * width + k] = planes[k * n + i + j];
        if (rotate)
            rotate_right_in_place(dst, m, width);
    }
}

#define PLANES(WIDTH)                                                                                              \
    CLONES static void split_##WIDTH(const uint8_t *data, uint8_t *planes, size_t n, int rotate)                   \
    {                                                                                                              \
        split(data, planes, n, rotate, WIDTH);                                                                     \
    }                                                                                                              \
    CLONES static void join_##WIDTH(const uint8_t *planes, uint8_t *out, size_t n, int rotate)                     \
    {                                                                                                              \
        join(planes, out, n, rotate, WIDTH);                                                                       \
    }
PLANES(1)
PLANES(2)
PLANES(4)
PLANES(8)

typedef void (*planes_fn)(const uint8_t *src, uint8_t *dst, size_t n, int rotate);

static int overlap(const Py_buffer *a, const Py_buffer *b)
{
    uintptr_t p = (uintptr_t)a->buf, q = (uintptr_t)b->buf;
    return p < q + (uintptr_t)b->len && q < p + (uintptr_t)a->len;
}

static const planes_fn split_fns[4] = {split_1, split_2, split_4, split_8};
static const planes_fn join_fns[4] = {join_1, join_2, join_4, join_8};

/* The one of functions for widths 1, 2, 4 and 8; NULL if there is none, or the buffers do not fit it. */
static planes_fn planes_of(const planes_fn fns[4], Py_ssize_t width, const Py_buffer *src, const Py_buffer *dst)
{
    if ((width != 1 && width != 2 && width != 4 && width != 8) || src->len != dst->len || src->len % width ||
        overlap(src, dst))
        return NULL;
    return fns[width == 1 ? 0 : width == 2 ? 1 : width == 4 ? 2 : 3];
}

static PyObject *bad_planes(void)
{
    PyErr_SetString(PyExc_ValueError, "planes: itemsize out of range, sizes do not match, or buffers overlap");
    return NULL;
}

/* Both directions: (source, destination, itemsize, rotate) -> None. */
static PyObject *planes_call(PyObject *args, const char *format, const planes_fn fns[4])
{
    Py_buffer src, dst;
    Py_ssize_t width;
    int rotate;
    planes_fn fn;
    if (!PyArg_ParseTuple(args, format, &src, &dst, &width, &rotate))
        return NULL;
    fn = planes_of(fns, width, &src, &dst);
    if (fn) {
        Py_BEGIN_ALLOW_THREADS
        fn(src.buf, dst.buf, (size_t)(src.len / width), rotate);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&src);
    PyBuffer_Release(&dst);
    if (!fn)
        return bad_planes();
    Py_RETURN_NONE;
}

static PyObject *py_split_planes(PyObject *self, PyObject *args)
{
    (void)self;
    return planes_call(args, "y*w*np:split_planes", split_fns);
}

static PyObject *py_join_planes(PyObject *self, PyObject *args)
{
    (void)self;
    return planes_call(args, "y*w*np:join_planes", join_fns);
}

/* ---- histogram of a strided sample ---------------------------------------------------------------------------- */

/* Counts of the bytes data[0], data[step], ...: n_samples of them, all inside data.
 * Two tables, so that a run of one value does not wait for its own last store. */
static void sample_counts(const uint8_t *data, size_t step, size_t n_samples, uint32_t counts[256])
{
    uint32_t odd[256] = {0};
    size_t i;
    memset(counts, 0, 256 * sizeof *counts);
    for (i = 0; i + 2 <= n_samples; i += 2) {
        counts[data[i * step]]++;
        odd[data[(i + 1) * step]]++;
    }
    if (i < n_samples)
        counts[data[i * step]]++;
    for (i = 0; i < 256; i++)
        counts[i] += odd[i];
}

/* Bytes of a sample of n_max at most, and how far apart they are: an odd number. */
static size_t sample_of(size_t size, size_t n_max, size_t *step)
{
    size_t n;
    *step = size / n_max ? (size / n_max - 1) | 1 : 1;
    n = size / *step + (size % *step != 0);
    return n < n_max ? n : n_max;
}

/* Entropy of a sample of n bytes, as sample_of says.  bits[c] is c * log2(c), in 2**-32, for c up to n: sums of whole
 * numbers, the same in any order. */
static double entropy(const uint8_t *data, size_t step, size_t n, const int64_t *bits)
{
    uint32_t counts[256];
    int64_t rest = bits[n];
    int b;
    sample_counts(data, step, n, counts);
    for (b = 0; b < 256; b++)
        rest -= bits[counts[b]];
    return n ? (double)rest / ((double)n * 4294967296.0) : 0.0;
}

/* Entries of a table as `entropy` reads it; 0 if it is none. */
static size_t n_logs(const Py_buffer *table)
{
    return (uintptr_t)table->buf % sizeof(int64_t) == 0 ? (size_t)table->len / sizeof(int64_t) : 0;
}

static PyObject *py_entropies(PyObject *self, PyObject *args)
{
    Py_buffer table;
    PyObject *given, *found;
    Py_ssize_t n_samples, i;
    int ok;
    (void)self;
    if (!PyArg_ParseTuple(args, "O!y*n:entropies", &PyTuple_Type, &given, &table, &n_samples))
        return NULL;
    ok = n_samples >= 1 && n_logs(&table) > 0;
    found = ok ? PyList_New(0) : NULL;
    /* The GIL is kept: a plane takes 4 us, and a thread that lets go of it waits ten times that to have it back. */
    for (i = 0; found && i < PyTuple_Size(given); i++) {
        Py_buffer plane;
        PyObject *value = NULL;
        size_t step, n;
        if (PyObject_GetBuffer(PyTuple_GetItem(given, i), &plane, PyBUF_SIMPLE) == 0) {
            n = sample_of((size_t)plane.len, (size_t)n_samples, &step);
            ok = n < n_logs(&table);
            if (ok)
                value = PyFloat_FromDouble(entropy(plane.buf, step, n, table.buf));
            PyBuffer_Release(&plane);
        }
        if (!value || PyList_Append(found, value) < 0)
            Py_CLEAR(found);
        Py_XDECREF(value);
    }
    PyBuffer_Release(&table);
    if (!ok && !PyErr_Occurred())
        PyErr_SetString(PyExc_ValueError, "entropies: no samples, or table does not have all counts of them");
    return found;
}

/* ---- many buffers at a time ------------------------------------------------------------------------------------ */

/* Whatever is done to many buffers in one call is done to all with the lock let go of once: a thread that lets go of
 * it for every one waits longer to have it back than the work takes. */

/* Buffers held for a call. */
typedef struct {
    Py_buffer *of;
    Py_ssize_t n;
} held;

static int hold(held *all, Py_ssize_t n_max)
{
    all->n = 0;
    all->of = PyMem_Calloc(n_max > 0 ? (size_t)n_max : 1, sizeof *all->of);
    if (!all->of)
        PyErr_NoMemory();
    return all->of != NULL;
}

/* Take a buffer, of which there is room for one more; NULL with an exception if it is none. */
static Py_buffer *take_buffer(held *all, PyObject *from, int flags)
{
    if (!from || PyObject_GetBuffer(from, &all->of[all->n], flags) < 0)
        return NULL;
    return &all->of[all->n++];
}

static void let_go(held *all)
{
    while (all->n > 0)
        PyBuffer_Release(&all->of[--all->n]);
    PyMem_Free(all->of);
}

/* are_equal(left, right) -> list of bool: of two sequences of buffers, which pairs are the same bytes. */
static PyObject *py_are_equal(PyObject *self, PyObject *args)
{
    PyObject *left, *right, *found = NULL;
    Py_ssize_t n, i;
    held all;
    char *same = NULL;
    int ok;
    (void)self;
    if (!PyArg_ParseTuple(args, "O!O!:are_equal", &PyTuple_Type, &left, &PyTuple_Type, &right))
        return NULL;
    n = PyTuple_Size(left);
    if (n != PyTuple_Size(right)) {
        PyErr_SetString(PyExc_ValueError, "are_equal: not as many on both sides");
        return NULL;
    }
    if (!hold(&all, 2 * n))
        return NULL;
    same = PyMem_Calloc(n ? (size_t)n : 1, 1);
    ok = same != NULL;
    if (!ok)
        PyErr_NoMemory();
    for (i = 0; ok && i < n; i++)
        ok = take_buffer(&all, PyTuple_GetItem(left, i), PyBUF_SIMPLE) &&
             take_buffer(&all, PyTuple_GetItem(right, i), PyBUF_SIMPLE);
    if (ok) {
        Py_BEGIN_ALLOW_THREADS
        for (i = 0; i < n; i++) {
            const Py_buffer *a = &all.of[2 * i], *b = a + 1;
            same[i] = a->len == b->len && memcmp(a->buf, b->buf, (size_t)a->len) == 0;
        }
        Py_END_ALLOW_THREADS
        found = PyList_New(n);
    }
    for (i = 0; found && i < n; i++)
        if (PyList_SetItem(found, i, PyBool_FromLong(same[i])) < 0)
            Py_CLEAR(found);
    PyMem_Free(same);
    let_go(&all);
    return found;
}

/* move(moves): of each (out, offset, source) copy the source to there, one after another; they may overlap. */
static PyObject *py_move(PyObject *self, PyObject *args)
{
    PyObject *moves;
    Py_ssize_t n, i, *offsets = NULL;
    held all;
    int ok = 1;
    (void)self;
    if (!PyArg_ParseTuple(args, "O!:move", &PyTuple_Type, &moves))
        return NULL;
    n = PyTuple_Size(moves);
    if (!hold(&all, 2 * n))
        return NULL;
    offsets = PyMem_Calloc(n ? (size_t)n : 1, sizeof *offsets);
    ok = offsets != NULL;
    if (!ok)
        PyErr_NoMemory();
    for (i = 0; ok && i < n; i++) {
        PyObject *out, *source;
        const Py_buffer *to, *from;
        if (!PyArg_ParseTuple(PyTuple_GetItem(moves, i), "OnO:move", &out, &offsets[i], &source)) {
            ok = 0;
            break;
        }
        to = take_buffer(&all, out, PyBUF_WRITABLE);
        from = to ? take_buffer(&all, source, PyBUF_SIMPLE) : NULL;
        ok = from != NULL;
        if (ok && (offsets[i] < 0 || from->len > to->len || offsets[i] > to->len - from->len)) {
            PyErr_SetString(PyExc_ValueError, "move: what is moved does not fit where it is to go");
            ok = 0;
        }
    }
    if (ok) {
        Py_BEGIN_ALLOW_THREADS
        for (i = 0; i < n; i++) {
            uint8_t *to = (uint8_t *)all.of[2 * i].buf + offsets[i];
            const Py_buffer *from = &all.of[2 * i + 1];
            if (from->len && to != from->buf)
                memmove(to, from->buf, (size_t)from->len);
        }
        Py_END_ALLOW_THREADS
    }
    PyMem_Free(offsets);
    let_go(&all);
    if (!ok)
        return NULL;
    Py_RETURN_NONE;
}

static double sampled(const uint8_t *data, size_t size, const int64_t *logs, size_t n_samples)
{
    size_t step, n = sample_of(size, n_samples, &step);
    return entropy(data, step, n, logs);
}

static PyObject *as_floats(const double *values, size_t n)
{
    PyObject *found = PyList_New(0);
    size_t i;
    for (i = 0; found && i < n; i++) {
        PyObject *value = PyFloat_FromDouble(values[i]);
        if (!value || PyList_Append(found, value) < 0)
            Py_CLEAR(found);
        Py_XDECREF(value);
    }
    return found;
}

/* Data to be split into planes, and the entropies of those. */
typedef struct {
    planes_fn fn;
    Py_ssize_t width;
    int rotate;
    double bits[8];
} splitting;

/* split_all(of (data, planes, itemsize, rotate) each, table, n_samples) -> list of lists of float. */
static PyObject *py_split_all(PyObject *self, PyObject *args)
{
    PyObject *given, *found = NULL;
    Py_buffer table;
    Py_ssize_t n_samples, n, i, k;
    splitting *each;
    held all;
    int ok;
    (void)self;
    if (!PyArg_ParseTuple(args, "O!y*n:split_all", &PyTuple_Type, &given, &table, &n_samples))
        return NULL;
    n = PyTuple_Size(given);
    each = PyMem_Calloc((size_t)n + 1, sizeof *each);
    ok = hold(&all, 2 * n) && each;
    if (!ok)
        PyErr_NoMemory();
    else if (n_samples < 1 || (size_t)n_samples >= n_logs(&table)) {
        bad_planes();
        ok = 0;
    }
    for (i = 0; ok && i < n; i++) {
        PyObject *data_of, *planes_of_it;
        const Py_buffer *data, *planes;
        splitting *one = &each[i];
        ok = PyArg_ParseTuple(PyTuple_GetItem(given, i), "OOnp:split_all", &data_of, &planes_of_it, &one->width,
                              &one->rotate) &&
             (data = take_buffer(&all, data_of, PyBUF_SIMPLE)) &&
             (planes = take_buffer(&all, planes_of_it, PyBUF_WRITABLE));
        if (!ok)
            break;
        one->fn = planes_of(split_fns, one->width, data, planes);
        ok = one->fn != NULL;
        if (!ok)
            bad_planes();
    }
    if (ok) {
        Py_BEGIN_ALLOW_THREADS
        for (i = 0; i < n; i++) {
            uint8_t *planes = all.of[2 * i + 1].buf;
            size_t size = (size_t)(all.of[2 * i].len / each[i].width);
            each[i].fn(all.of[2 * i].buf, planes, size, each[i].rotate);
            for (k = 0; k < each[i].width; k++)
                each[i].bits[k] = sampled(planes + (size_t)k * size, size, table.buf, (size_t)n_samples);
        }
        Py_END_ALLOW_THREADS
        found = PyList_New(n);
    }
    for (i = 0; found && i < n; i++) {
        PyObject *bits = as_floats(each[i].bits, (size_t)each[i].width);
        if (!bits || PyList_SetItem(found, i, bits) < 0)
            Py_CLEAR(found);
    }
    PyMem_Free(each);
    let_go(&all);
    PyBuffer_Release(&table);
    return found;
}

/* ---- deltas of a base ------------------------------------------------------------------------------------------ */

/* How an element becomes an integer that is near where the number is near; frozen (docs/format.md, "Deltas"). */
enum { MAP_INT = 0, MAP_SUB = 1, MAP_RSUB = 2 };
/* How an element of the base becomes one of the chunk's: as it is, or narrowed. */
enum { CAST_NONE = 0, CAST_F32_BF16 = 1, CAST_F32_F16 = 2, CAST_F64_F32 = 3, N_CASTS = 4 };

#define DELTA_BLOCK 1024 /* elements worked on at a time: 8 KiB stay in L1 */

/* A number narrowed to the nearest, ties to even, by integers alone: no rounding mode, no flushed denormals.
 * exp_* and man_* are bits of exponent and mantissa.  Every NaN becomes one, quiet and positive. */
TEMPLATE uint64_t narrowed(uint64_t v, int exp_in, int man_in, int exp_out, int man_out)
{
    uint64_t sign = v >> (exp_in + man_in), man = v & ((UINT64_C(1) << man_in) - 1), out, rest, half;
    int64_t exp = (int64_t)(v >> man_in & ((UINT64_C(1) << exp_in) - 1));
    int64_t exp_max_in = ((int64_t)1 << exp_in) - 1, exp_max_out = ((int64_t)1 << exp_out) - 1;
    int shift = man_in - man_out;
    if (exp == exp_max_in) {
        out = (uint64_t)exp_max_out << man_out;
        if (man)
            return out | UINT64_C(1) << (man_out - 1);
        return sign << (exp_out + man_out) | out;
    }
    if (exp)
        man |= UINT64_C(1) << man_in;
    else
        exp = 1;
    exp += (((int64_t)1 << (exp_out - 1)) - 1) - (((int64_t)1 << (exp_in - 1)) - 1);
    if (exp < 1) {
        shift = 1 - exp > man_in + 1 ? man_in + 2 : shift + (int)(1 - exp);
        exp = 1;
    }
    if (shift > man_in + 1) {
        out = 0;
    } else {
        half = UINT64_C(1) << (shift - 1);
        rest = man & ((half << 1) - 1);
        out = man >> shift;
        out += rest > half || (rest == half && (out & 1));
    }
    /* The hidden bit adds one to the exponent; a carry out of the mantissa adds another. */
    out += (uint64_t)(exp - 1) << man_out;
    if (out >= (uint64_t)exp_max_out << man_out)
        out = (uint64_t)exp_max_out << man_out;
    return sign << (exp_out + man_out) | out;
}

TEMPLATE uint16_t bf16_of(uint32_t v)
{
    uint32_t rounded = (v + 0x7fffu + (v >> 16 & 1)) >> 16;
    return (uint16_t)((v & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

/* v * scale rounded to nearest, ties to even, where v and the product are far from the denormals and from infinity;
 * others stay as they are.  By integers: the same in every mode of the processor and at every width of its
 * registers.  `bits` are those of the scale, a normal float32. */
TEMPLATE uint32_t scaled32_exactly(uint32_t v, uint32_t bits)
{
    uint64_t p = (uint64_t)((v & 0x7fffffu) | 0x800000u) * ((bits & 0x7fffffu) | 0x800000u);
    uint32_t up = (uint32_t)(p >> 47), shift = 23 + up, q = (uint32_t)(p >> shift);
    uint64_t rest = p & ((UINT64_C(1) << shift) - 1), half = UINT64_C(1) << (shift - 1);
    uint32_t exp = (v >> 23 & 0xff) + (bits >> 23) - 127 + up - 1;
    q += rest > half || (rest == half && (q & 1));
    return (v >> 23 & 0xff) - 9u < 245u ? (v & 0x80000000u) | ((exp << 23) + q) : v;
}

TEMPLATE uint64_t scaled64_exactly(uint64_t v, uint32_t bits)
{
    uint64_t man = (v & ((UINT64_C(1) << 52) - 1)) | UINT64_C(1) << 52, by = (bits & 0x7fffffu) | 0x800000u;
    uint64_t low = (man & 0xffffffffu) * by, high = (man >> 32) * by + (low >> 32);
    uint32_t up = (uint32_t)(high >> 44), shift = 23 + up;
    uint64_t q, rest, half = UINT64_C(1) << (shift - 1), exp = (v >> 52 & 0x7ff) + (bits >> 23) - 127 + up - 1;
    low &= 0xffffffffu;
    q = high << (32 - shift) | low >> shift;
    rest = low & ((UINT64_C(1) << shift) - 1);
    q += rest > half || (rest == half && (q & 1));
    return (v >> 52 & 0x7ff) - 9u < 2037u ? (v & UINT64_C(1) << 63) | ((exp << 52) + q) : v;
}

/* The same by the processor, some six times as fast, where it rounds to nearest and to the width of the type. */
TEMPLATE uint32_t scaled32(uint32_t v, float scale)
{
    uint32_t product;
    float f;
    memcpy(&f, &v, 4);
    f *= scale;
    memcpy(&product, &f, 4);
    return (v >> 23 & 0xff) - 9u < 245u ? product : v;
}

TEMPLATE uint64_t scaled64(uint64_t v, float scale)
{
    uint64_t product;
    double f;
    memcpy(&f, &v, 8);
    f *= (double)scale;
    memcpy(&product, &f, 8);
    return (v >> 52 & 0x7ff) - 9u < 2037u ? product : v;
}

static int rounds_to_nearest(void)
{
#if defined(FLT_EVAL_METHOD) && FLT_EVAL_METHOD == 0
    /* Volatile, or the compiler computes this in its own mode. */
    volatile float one = 1.0f, little = 0x1p-25f, much = 0x1.8p-24f;
    volatile float up = one + little, down = -one - little, toward_zero = one + much;
    return up == 1.0f && down == -1.0f && toward_zero > 1.0f;
#else
    return 0;
#endif
}

/* Eight bytes of 0 or 1 as bits, the first the lowest: no two products meet in a bit. */
TEMPLATE uint64_t gathered(uint64_t bytes)
{
    return bytes * UINT64_C(0x0102040810204080) >> 56;
}

TEMPLATE unsigned lowest_bit(uint64_t bits)
{
#if defined(__GNUC__)
    return (unsigned)__builtin_ctzll(bits);
#else
    unsigned n = 0;
    for (; !(bits & 1); bits >>= 1)
        n++;
    return n;
#endif
}

/* Differences by length, the classes: how many bytes each has but zeros at its top, rounded up to those in use. */
#define N_CLASSES_MAX 5
#define N_PLANES_MAX 31 /* one of digits, and bytes of 4 to 8 */
typedef struct {
    size_t n;                       /* classes, at least 1 */
    uint8_t lengths[N_CLASSES_MAX]; /* ascending, at most the bytes of an element */
    size_t counts[N_CLASSES_MAX];   /* elements of each, n of them in all */
} classes;

/* Into which classes differences go, given how many of them have each length; differences.classes says the rule. */
static void classify(const int64_t *counts, size_t width, classes *of)
{
    static const int64_t rare[] = {32, 16, 8, 4}; /* above a fourth are three at most, and the longest */
    int64_t n = 0;
    size_t l, r, longest = 0;
    for (l = 0; l <= width; l++) {
        n += counts[l];
        longest = counts[l] ? l : longest;
    }
    for (r = 0, of->n = N_CLASSES_MAX + 1; of->n > N_CLASSES_MAX; r++) {
        int64_t waiting = 0;
        for (l = 0, of->n = 0; l <= longest; l++) {
            waiting += counts[l];
            if (l != longest && waiting * rare[r] <= n)
                continue;
            if (of->n < N_CLASSES_MAX) {
                of->lengths[of->n] = (uint8_t)l;
                of->counts[of->n] = (size_t)waiting;
            }
            of->n++;
            waiting = 0;
        }
    }
}

/* A block's differences are sorted into five rooms of one array.  Where the next of each class goes stands in 12 bits
 * of one number: no memory is waited for, whatever comes in which order. */
#define GROUP_BLOCK 480 /* elements: their classes fill whole bytes, 8, 5, 4 or 3 to one */
#define PLACE_BITS 12
#define PLACE_MAX ((UINT64_C(1) << PLACE_BITS) - 1)
#define FIRST_PLACES                                                                                               \
    (GROUP_BLOCK * (UINT64_C(1) << PLACE_BITS | UINT64_C(2) << 2 * PLACE_BITS | UINT64_C(3) << 3 * PLACE_BITS |    \
                    UINT64_C(4) << 4 * PLACE_BITS))

/* What stands for a plane that is all zeros. */
static const uint8_t no_bytes[GROUP_BLOCK];

TEMPLATE void to_shifts(uint8_t class_of[GROUP_BLOCK + 8])
{
    size_t i;
    for (i = 0; i < GROUP_BLOCK + 8; i++)
        class_of[i] = (uint8_t)(class_of[i] * PLACE_BITS);
}

TEMPLATE int are_alike(const uint8_t bytes[8])
{
    uint64_t v;
    memcpy(&v, bytes, 8);
    return v == (v & 0xff) * UINT64_C(0x0101010101010101);
}

static int is_complete(const classes *of, const size_t at[N_CLASSES_MAX])
{
    size_t c;
    for (c = 0; c < of->n; c++)
        if (at[c] != of->counts[c])
            return 0;
    return 1;
}

/* Classes that share a byte, each a digit of a number in base n; none where there is one class only. */
static size_t digits_of(size_t n)
{
    return n == 2 ? 8 : n == 3 ? 5 : n == 4 ? 4 : 3;
}

static size_t digits_size(size_t n_classes, size_t n)
{
    return n_classes < 2 ? 0 : (n + digits_of(n_classes) - 1) / digits_of(n_classes);
}

TEMPLATE uint8_t *digits_in(const uint8_t *class_of, size_t m, size_t n_classes, size_t per, uint8_t *to)
{
    size_t i, d;
    for (i = 0; i < m; i += per) {
        uint32_t number = 0, unit = 1;
        for (d = 0; d < per; d++, unit *= (uint32_t)n_classes)
            number += class_of[i + d] * unit;
        *to++ = (uint8_t)number;
    }
    return to;
}

/* class_of[m] and behind are 0, as far as the last byte goes. */
TEMPLATE uint8_t *write_digits(const uint8_t *class_of, size_t m, size_t n_classes, uint8_t *to)
{
    size_t i;
    if (n_classes == 2)
        for (i = 0; i < m; i += 8)
            *to++ = (uint8_t)gathered(load64(class_of + i));
    return n_classes == 3   ? digits_in(class_of, m, 3, 5, to)
           : n_classes == 4 ? digits_in(class_of, m, 4, 4, to)
           : n_classes == 5 ? digits_in(class_of, m, 5, 3, to)
                            : to;
}

/* table[v] = the digits of v, and zeros or what has no place in a byte behind them. */
static void digits_table(size_t n_classes, uint8_t table[256][8])
{
    size_t v, d;
    memset(table[0], 0, 8);
    for (v = 1; n_classes > 1 && v < 256; v++) { /* one more than the last, with carries: 2048 divisions take 5 us */
        memcpy(table[v], table[v - 1], 8);
        for (d = 0; d < 8; d++) {
            if (++table[v][d] < n_classes)
                break;
            table[v][d] = 0;
        }
    }
}

/* How many of a block's first m elements are of a class: in bytes, 240 at a time, as many as a register has. */
TEMPLATE size_t count_class(const uint8_t *class_of, size_t m, size_t c)
{
    size_t i, j, n = 0;
    for (i = 0; i < m; i += GROUP_BLOCK / 2) {
        size_t end = m - i < GROUP_BLOCK / 2 ? m : i + GROUP_BLOCK / 2;
        uint8_t here = 0;
        for (j = i; j < end; j++)
            here = (uint8_t)(here + (class_of[j] == (uint8_t)c));
        n += here;
    }
    return n;
}

/* A byte too large for its digits gives some: then the classes have other sizes, or the chunk another id. */
TEMPLATE const uint8_t *read_digits(const uint8_t *from, size_t m, size_t n_classes, const uint8_t table[256][8],
                                    uint8_t class_of[GROUP_BLOCK + 8])
{
    size_t per = digits_of(n_classes), i;
    if (n_classes < 2 || !from) {
        memset(class_of, 0, GROUP_BLOCK + 8);
        return from;
    }
    for (i = 0; i < m; i += per)
        memcpy(class_of + i, table[*from++], 8);
    return from;
}

/* The code below is one for all widths: UINT is the element's type, WIDTH its bytes. */
#define DELTA(UINT, WIDTH, LOAD, STORE)                                                                            \
    TEMPLATE UINT ordered_##WIDTH(UINT v)                                                                          \
    {                                                                                                              \
        UINT top = (UINT)1 << (8 * WIDTH - 1);                                                                     \
        return v ^ ((UINT)(0 - (v >> (8 * WIDTH - 1))) | top);                                                     \
    }                                                                                                              \
    TEMPLATE UINT unordered_##WIDTH(UINT v)                                                                        \
    {                                                                                                              \
        UINT top = (UINT)1 << (8 * WIDTH - 1);                                                                     \
        return v ^ ((UINT)((v >> (8 * WIDTH - 1)) - 1) | top);                                                     \
    }                                                                                                              \
    TEMPLATE UINT mapped_##WIDTH(UINT v, int map)                                                                  \
    {                                                                                                              \
        if (map == MAP_SUB)                                                                                        \
            return ordered_##WIDTH(v);                                                                             \
        return map == MAP_RSUB ? (UINT)(v << 1 | v >> (8 * WIDTH - 1)) : v;                                        \
    }                                                                                                              \
    TEMPLATE UINT unmapped_##WIDTH(UINT v, int map)                                                                \
    {                                                                                                              \
        if (map == MAP_SUB)                                                                                        \
            return unordered_##WIDTH(v);                                                                           \
        return map == MAP_RSUB ? (UINT)(v >> 1 | v << (8 * WIDTH - 1)) : v;                                        \
    }                                                                                                              \
    TEMPLATE UINT zigzag_##WIDTH(UINT v)                                                                           \
    {                                                                                                              \
        return (UINT)(v << 1) ^ (UINT)(0 - (v >> (8 * WIDTH - 1)));                                                \
    }                                                                                                              \
    TEMPLATE UINT unzigzag_##WIDTH(UINT v)                                                                         \
    {                                                                                                              \
        return (UINT)(v >> 1) ^ (UINT)(0 - (v & 1));                                                               \
    }                                                                                                              \
    /* out = the base's elements from `first`, cast and scaled. */                                                 \
    TEMPLATE void prepare_##WIDTH(const uint8_t *base, size_t first, size_t m, int cast, float scale, UINT *out)   \
    {                                                                                                              \
        size_t i;                                                                                                  \
        if (cast == CAST_F32_BF16)                                                                                 \
            for (i = 0; i < m; i++)                                                                                \
                out[i] = (UINT)bf16_of(load32(base + 4 * (first + i)));                                            \
        else if (cast == CAST_F32_F16)                                                                             \
            for (i = 0; i < m; i++)                                                                                \
                out[i] = (UINT)narrowed(load32(base + 4 * (first + i)), 8, 23, 5, 10);                             \
        else if (cast == CAST_F64_F32)                                                                             \
            for (i = 0; i < m; i++)                                                                                \
                out[i] = (UINT)narrowed(load64(base + 8 * (first + i)), 11, 52, 8, 23);                            \
        else                                                                                                       \
            for (i = 0; i < m; i++)                                                                                \
                out[i] = LOAD(base + WIDTH * (first + i));                                                         \
        if (scale != 1.0f) {                                                                                       \
            int fast = rounds_to_nearest();                                                                        \
            uint32_t bits;                                                                                         \
            memcpy(&bits, &scale, 4);                                                                              \
            if (WIDTH == 2)                                                                                        \
                for (i = 0; i < m; i++)                                                                            \
                    out[i] = (UINT)bf16_of(scaled32_exactly((uint32_t)out[i] << 16, bits));                        \
            else if (WIDTH == 4 && fast)                                                                           \
                for (i = 0; i < m; i++)                                                                            \
                    out[i] = (UINT)scaled32((uint32_t)out[i], scale);                                              \
            else if (WIDTH == 4)                                                                                   \
                for (i = 0; i < m; i++)                                                                            \
                    out[i] = (UINT)scaled32_exactly((uint32_t)out[i], bits);                                       \
            else if (WIDTH == 8 && fast)                                                                           \
                for (i = 0; i < m; i++)                                                                            \
                    out[i] = (UINT)scaled64((uint64_t)out[i], scale);                                              \
            else if (WIDTH == 8)                                                                                   \
                for (i = 0; i < m; i++)                                                                            \
                    out[i] = (UINT)scaled64_exactly((uint64_t)out[i], bits);                                       \
        }                                                                                                          \
    }                                                                                                              \
    /* Where such elements stand: in the base itself, if there is nothing to be done to them, else in `room`. */   \
    TEMPLATE const uint8_t *prepared_##WIDTH(const uint8_t *base, size_t first, size_t m, int cast, float scale,   \
                                             UINT *room)                                                           \
    {                                                                                                              \
        size_t i;                                                                                                  \
        if (cast == CAST_NONE && scale == 1.0f)                                                                    \
            return base + WIDTH * first;                                                                           \
        prepare_##WIDTH(base, first, m, cast, scale, room);                                                        \
        for (i = 0; i < m; i++)                                                                                    \
            STORE((uint8_t *)room + WIDTH * i, room[i]);                                                           \
        return (const uint8_t *)room;                                                                              \
    }                                                                                                              \
    TEMPLATE void differences_##WIDTH(const uint8_t *data, const uint8_t *base, size_t first, size_t m, int map,   \
                                      int cast, float scale, UINT *out)                                            \
    {                                                                                                              \
        UINT room[DELTA_BLOCK];                                                                                    \
        const uint8_t *from = prepared_##WIDTH(base, first, m, cast, scale, room);                                 \
        size_t i;                                                                                                  \
        data += WIDTH * first;                                                                                     \
        if (map == MAP_SUB)                                                                                        \
            for (i = 0; i < m; i++)                                                                                \
                out[i] = zigzag_##WIDTH((UINT)(mapped_##WIDTH(LOAD(data + WIDTH * i), MAP_SUB) -                   \
                                               mapped_##WIDTH(LOAD(from + WIDTH * i), MAP_SUB)));                  \
        else if (map == MAP_RSUB)                                                                                  \
            for (i = 0; i < m; i++)                                                                                \
                out[i] = zigzag_##WIDTH((UINT)(mapped_##WIDTH(LOAD(data + WIDTH * i), MAP_RSUB) -                  \
                                               mapped_##WIDTH(LOAD(from + WIDTH * i), MAP_RSUB)));                 \
        else                                                                                                       \
            for (i = 0; i < m; i++)                                                                                \
                out[i] = zigzag_##WIDTH((UINT)(LOAD(data + WIDTH * i) - LOAD(from + WIDTH * i)));                  \
    }                                                                                                              \
    /* out = the elements at `from` and differences added up. */                                                   \
    TEMPLATE void sums_##WIDTH(const UINT *z, const uint8_t *from, size_t m, int map, uint8_t *out)                \
    {                                                                                                              \
        size_t i;                                                                                                  \
        if (map == MAP_SUB)                                                                                        \
            for (i = 0; i < m; i++)                                                                                \
                STORE(out + WIDTH * i,                                                                             \
                      unmapped_##WIDTH((UINT)(mapped_##WIDTH(LOAD(from + WIDTH * i), MAP_SUB) +                    \
                                              unzigzag_##WIDTH(z[i])), MAP_SUB));                                  \
        else if (map == MAP_RSUB)                                                                                  \
            for (i = 0; i < m; i++)                                                                                \
                STORE(out + WIDTH * i,                                                                             \
                      unmapped_##WIDTH((UINT)(mapped_##WIDTH(LOAD(from + WIDTH * i), MAP_RSUB) +                   \
                                              unzigzag_##WIDTH(z[i])), MAP_RSUB));                                 \
        else                                                                                                       \
            for (i = 0; i < m; i++)                                                                                \
                STORE(out + WIDTH * i, (UINT)(LOAD(from + WIDTH * i) + unzigzag_##WIDTH(z[i])));                   \
    }                                                                                                              \
    /* to[j] = the bytes j of so many planes, from `at` on, the first the lowest; in one pass where there are few. */\
    TEMPLATE void gather_##WIDTH(const uint8_t *const *planes, size_t length, size_t at, size_t n, UINT *to)      \
    {                                                                                                             \
        const uint8_t *p[4];                                                                                      \
        size_t j, l;                                                                                              \
        for (l = 0; l < 4; l++)                                                                                   \
            p[l] = l < length && planes[l] ? planes[l] + at : no_bytes;                                           \
        if (length == 0)                                                                                          \
            memset(to, 0, n * sizeof *to);                                                                        \
        else if (length == 1)                                                                                     \
            for (j = 0; j < n; j++)                                                                               \
                to[j] = p[0][j];                                                                                  \
        else if (length == 2)                                                                                     \
            for (j = 0; j < n; j++)                                                                               \
                to[j] = (UINT)(p[0][j] | (uint32_t)p[1][j] << 8);                                                 \
        else if (length == 3)                                                                                     \
            for (j = 0; j < n; j++)                                                                               \
                to[j] = (UINT)(p[0][j] | (uint32_t)p[1][j] << 8 | (uint32_t)p[2][j] << 16);                       \
        else                                                                                                      \
            for (j = 0; j < n; j++)                                                                               \
                to[j] = (UINT)(p[0][j] | (uint32_t)p[1][j] << 8 | (uint32_t)p[2][j] << 16 | (uint32_t)p[3][j] << 24);\
        for (l = 4; l < length; l++)                                                                              \
            if (planes[l])                                                                                        \
                for (j = 0; j < n; j++)                                                                           \
                    to[j] = (UINT)(to[j] | (UINT)((uint64_t)planes[l][at + j] << (8 * l)));                       \
    }                                                                                                             \
    /* counts[l] = differences whose highest byte that is not zero is the l-th; counts[0] of those that are 0. */ \
    CLONES static void delta_lengths_##WIDTH(const uint8_t *data, const uint8_t *base, size_t n, int map, int cast,\
                                             float scale, int64_t counts[WIDTH + 1])                              \
    {                                                                                                             \
        UINT z[DELTA_BLOCK];                                                                                      \
        size_t i, j, l;                                                                                           \
        for (l = 0; l <= WIDTH; l++)                                                                              \
            counts[l] = 0;                                                                                        \
        for (i = 0; i < n; i += DELTA_BLOCK) {                                                                    \
            size_t m = n - i < DELTA_BLOCK ? n - i : DELTA_BLOCK;                                                 \
            differences_##WIDTH(data, base, i, m, map, cast, scale, z);                                           \
            counts[0] += (int64_t)m;                                                                              \
            uint32_t longer[WIDTH] = {0};                                                                          \
            for (j = 0; j < m; j++)                                                                                \
                for (l = 0; l < WIDTH; l++)                                                                        \
                    longer[l] += z[j] > (UINT)(((UINT)1 << (8 * l)) - 1);                                          \
            for (l = 0; l < WIDTH; l++) {                                                                          \
                counts[l] -= longer[l];                                                                            \
                counts[l + 1] += longer[l];                                                                        \
            }                                                                                                      \
        }                                                                                                          \
    }                                                                                                              \
    /* Writes the class of each element, several to a byte, then each class's differences as planes, of as many bytes\
     * as its length says.  0 unless every class has exactly as many elements as `counts` says. */                \
    CLONES static int delta_group_##WIDTH(const uint8_t *data, const uint8_t *base, size_t n, int map, int cast,  \
                                          float scale, const classes *of, uint8_t *out)                           \
    {                                                                                                             \
        UINT z[GROUP_BLOCK], some[N_CLASSES_MAX * GROUP_BLOCK];                                                   \
        uint8_t class_of[GROUP_BLOCK + 8], *digits = out;                                                         \
        size_t at[N_CLASSES_MAX] = {0}, i, j, k, c, l;                                                               \
        for (i = 0; i < n; i += GROUP_BLOCK) {                                                                    \
            size_t m = n - i < GROUP_BLOCK ? n - i : GROUP_BLOCK;                                                 \
            uint8_t *plane = out + digits_size(of->n, n);                                                         \
            uint64_t next = FIRST_PLACES;                                                                         \
            differences_##WIDTH(data, base, i, m, map, cast, scale, z);                                           \
            memset(class_of, 0, sizeof class_of);                                                                 \
            /* What is longer than the last gets a class that is none: then they are too few. */                  \
            for (c = 0; c < of->n && of->lengths[c] < WIDTH; c++) {                                               \
                UINT limit = (UINT)(((UINT)1 << (8 * of->lengths[c])) - 1);                                       \
                for (j = 0; j < m; j++)                                                                           \
                    class_of[j] = (uint8_t)(class_of[j] + (z[j] > limit));                                        \
            }                                                                                                     \
            digits = write_digits(class_of, m, of->n, digits);                                                    \
            to_shifts(class_of);                                                                                  \
            for (j = 0; j + 8 <= m; j += 8) {                                                                      \
                if (are_alike(class_of + j)) {                                                                     \
                    memcpy(some + (next >> class_of[j] & PLACE_MAX), z + j, 8 * sizeof *z);                        \
                    next += UINT64_C(8) << class_of[j];                                                            \
                    continue;                                                                                      \
                }                                                                                                  \
                for (k = j; k < j + 8; k++) {                                                                      \
                    some[next >> class_of[k] & PLACE_MAX] = z[k];                                                  \
                    next += UINT64_C(1) << class_of[k];                                                            \
                }                                                                                                  \
            }                                                                                                      \
            for (; j < m; j++) {                                                                                   \
                some[next >> class_of[j] & PLACE_MAX] = z[j];                                                      \
                next += UINT64_C(1) << class_of[j];                                                                \
            }                                                                                                      \
            for (c = 0; c < of->n; c++) {                                                                         \
                const UINT *from = some + c * GROUP_BLOCK;                                                        \
                size_t here = (size_t)((next - FIRST_PLACES) >> PLACE_BITS * c & PLACE_MAX);                      \
                if (here > of->counts[c] - at[c])                                                                 \
                    return 0;                                                                                     \
                for (l = 0; l < of->lengths[c]; l++, plane += of->counts[c])                                      \
                    for (j = 0; j < here; j++)                                                                    \
                        plane[at[c] + j] = (uint8_t)(from[j] >> (8 * l));                                         \
                at[c] += here;                                                                                    \
            }                                                                                                     \
        }                                                                                                         \
        return is_complete(of, at);                                                                               \
    }                                                                                                             \
    /* The inverse, a plane that is NULL being zeros.  0 unless the classes have exactly as many elements. */     \
    CLONES static int delta_ungroup_##WIDTH(const uint8_t *digits, const uint8_t *const *planes,                  \
                                            const uint8_t *base, uint8_t *out, size_t n, int map, int cast,       \
                                            float scale, const classes *of)                                       \
    {                                                                                                             \
        UINT z[GROUP_BLOCK], room[GROUP_BLOCK], some[N_CLASSES_MAX * GROUP_BLOCK];                                \
        uint8_t class_of[GROUP_BLOCK + 8], table[256][8];                                                         \
        size_t at[N_CLASSES_MAX] = {0}, i, j, k, c;                                                                  \
        digits_table(of->n, table);                                                                               \
        for (i = 0; i < n; i += GROUP_BLOCK) {                                                                    \
            size_t m = n - i < GROUP_BLOCK ? n - i : GROUP_BLOCK;                                                 \
            const uint8_t *const *plane = planes;                                                                 \
            uint64_t next = FIRST_PLACES;                                                                         \
            digits = read_digits(digits, m, of->n, (const uint8_t(*)[8])table, class_of);                         \
            for (c = 0; c < of->n; c++) {                                                                         \
                UINT *to = some + c * GROUP_BLOCK;                                                                \
                size_t here = count_class(class_of, m, c);                                                        \
                if (here > of->counts[c] - at[c])                                                                 \
                    return 0;                                                                                     \
                gather_##WIDTH(plane, of->lengths[c], at[c], here, to);                                           \
                plane += of->lengths[c];                                                                          \
                at[c] += here;                                                                                    \
            }                                                                                                     \
            to_shifts(class_of);                                                                                  \
            for (j = 0; j + 8 <= m; j += 8) {                                                                      \
                if (are_alike(class_of + j)) {                                                                     \
                    memcpy(z + j, some + (next >> class_of[j] & PLACE_MAX), 8 * sizeof *z);                        \
                    next += UINT64_C(8) << class_of[j];                                                            \
                    continue;                                                                                      \
                }                                                                                                  \
                for (k = j; k < j + 8; k++) {                                                                      \
                    z[k] = some[next >> class_of[k] & PLACE_MAX];                                                  \
                    next += UINT64_C(1) << class_of[k];                                                            \
                }                                                                                                  \
            }                                                                                                      \
            for (; j < m; j++) {                                                                                   \
                z[j] = some[next >> class_of[j] & PLACE_MAX];                                                      \
                next += UINT64_C(1) << class_of[j];                                                                \
            }                                                                                                      \
            sums_##WIDTH(z, prepared_##WIDTH(base, i, m, cast, scale, room), m, map, out + WIDTH * i);             \
        }                                                                                                          \
        return is_complete(of, at);                                                                               \
    }                                                                                                             \
    /* How many elements differ from the base's, cast but not scaled; counting ends where they are more than max. */\
    CLONES static size_t count_changed_##WIDTH(const uint8_t *data, const uint8_t *base, size_t n, int cast,       \
                                               size_t max)                                                         \
    {                                                                                                              \
        UINT room[DELTA_BLOCK];                                                                                    \
        size_t i, j, changed = 0;                                                                                  \
        for (i = 0; i < n && changed <= max; i += DELTA_BLOCK) {                                                   \
            size_t m = n - i < DELTA_BLOCK ? n - i : DELTA_BLOCK;                                                  \
            uint32_t here = 0;                                                                                     \
            const uint8_t *from = prepared_##WIDTH(base, i, m, cast, 1.0f, room);                                  \
            for (j = 0; j < m; j++)                                                                                \
                here += LOAD(data + WIDTH * (i + j)) != LOAD(from + WIDTH * j);                                    \
            changed += here;                                                                                       \
        }                                                                                                          \
        return changed;                                                                                            \
    }                                                                                                              \
    /* Writes the zigzagged differences of changed elements to packed, and where they are to places: a bitmap, or  \
     * the unchanged elements before each, 255 and go on where they are more.  Returns bytes of places, or         \
     * SIZE_MAX if something does not fit. */                                                                      \
    CLONES static size_t sparse_take_##WIDTH(const uint8_t *data, const uint8_t *base, size_t n, int map,          \
                                             int cast, int bitmap, uint8_t *places, size_t places_max,             \
                                             uint8_t *packed, size_t packed_max)                                   \
    {                                                                                                              \
        UINT z[DELTA_BLOCK];                                                                                       \
        uint16_t at[DELTA_BLOCK];                                                                                  \
        uint8_t is_changed[DELTA_BLOCK];                                                                           \
        size_t i, j, k, n_places = bitmap ? (n + 7) / 8 : 0, n_packed = 0, gap = 0;                                \
        if (n_places > places_max)                                                                                 \
            return SIZE_MAX;                                                                                       \
        memset(places, 0, n_places);                                                                               \
        for (i = 0; i < n; i += DELTA_BLOCK) {                                                                     \
            size_t m = n - i < DELTA_BLOCK ? n - i : DELTA_BLOCK, n_at = 0, last = 0;                              \
            differences_##WIDTH(data, base, i, m, map, cast, 1.0f, z);                                             \
            memset(is_changed, 0, sizeof is_changed);                                                              \
            for (j = 0; j < m; j++)                                                                                \
                is_changed[j] = z[j] != 0;                                                                         \
            for (j = 0; j < m; j += 64) {                                                                          \
                uint64_t bits = 0;                                                                                 \
                for (k = 0; k < 64; k += 8)                                                                        \
                    bits |= gathered(load64(is_changed + j + k)) << k;                                             \
                for (; bits; bits &= bits - 1)                                                                     \
                    at[n_at++] = (uint16_t)(j + lowest_bit(bits));                                                 \
            }                                                                                                      \
            if (n_packed + n_at > packed_max)                                                                      \
                return SIZE_MAX;                                                                                   \
            for (j = 0; j < n_at; j++) {                                                                           \
                STORE(packed + WIDTH * n_packed, z[at[j]]);                                                        \
                n_packed++;                                                                                        \
            }                                                                                                      \
            if (bitmap) {                                                                                          \
                for (j = 0; j < n_at; j++)                                                                         \
                    places[(i + at[j]) / 8] |= (uint8_t)(1u << ((i + at[j]) % 8));                                 \
                continue;                                                                                          \
            }                                                                                                      \
            for (j = 0; j < n_at; j++) {                                                                           \
                gap += at[j] - last;                                                                               \
                last = (size_t)at[j] + 1;                                                                          \
                if (gap / 255 + 1 > places_max - n_places)                                                         \
                    return SIZE_MAX;                                                                               \
                for (; gap >= 255; gap -= 255)                                                                     \
                    places[n_places++] = 255;                                                                      \
                places[n_places++] = (uint8_t)gap;                                                                 \
                gap = 0;                                                                                           \
            }                                                                                                      \
            gap += m - last;                                                                                       \
        }                                                                                                          \
        return n_packed == packed_max ? n_places : SIZE_MAX;                                                       \
    }                                                                                                              \
    /* The inverse: out = the base, with n_packed elements changed.  0 unless the places are exactly so many. */   \
    CLONES static int sparse_put_##WIDTH(const uint8_t *base, uint8_t *out, size_t n, int map, int cast,           \
                                         int bitmap, const uint8_t *places, size_t n_places,                       \
                                         const uint8_t *packed, size_t n_packed)                                   \
    {                                                                                                              \
        UINT room[DELTA_BLOCK];                                                                                    \
        size_t i, k = 0, at = 0;                                                                                   \
        for (i = 0; i < n; i += DELTA_BLOCK) {                                                                     \
            size_t m = n - i < DELTA_BLOCK ? n - i : DELTA_BLOCK;                                                  \
            memcpy(out + WIDTH * i, prepared_##WIDTH(base, i, m, cast, 1.0f, room), WIDTH * m);                    \
        }                                                                                                          \
        if (bitmap && n_places != (n + 7) / 8)                                                                     \
            return 0;                                                                                              \
        for (i = 0; i < n_places; i++) {                                                                           \
            uint32_t bits = places[i];                                                                             \
            if (!bitmap) {                                                                                         \
                at += bits;                                                                                        \
                if (bits == 255)                                                                                   \
                    continue;                                                                                      \
                bits = 1;                                                                                          \
            } else {                                                                                               \
                at = 8 * i;                                                                                        \
            }                                                                                                      \
            for (; bits; bits >>= 1, at++) {                                                                       \
                UINT v;                                                                                            \
                if (!(bits & 1))                                                                                   \
                    continue;                                                                                      \
                if (at >= n || k == n_packed)                                                                      \
                    return 0;                                                                                      \
                v = mapped_##WIDTH(LOAD(out + WIDTH * at), map);                                                   \
                v = (UINT)(v + unzigzag_##WIDTH(LOAD(packed + WIDTH * k)));                                        \
                STORE(out + WIDTH * at, unmapped_##WIDTH(v, map));                                                 \
                k++;                                                                                               \
            }                                                                                                      \
        }                                                                                                          \
        return k == n_packed;                                                                                      \
    }
#define LOAD8(p) (*(p))
#define STORE8(p, v) (*(p) = (v))
DELTA(uint8_t, 1, LOAD8, STORE8)
DELTA(uint16_t, 2, load16, store16)
DELTA(uint32_t, 4, load32, store32)
DELTA(uint64_t, 8, load64, store64)

/* Bytes of an element of the base, given those of the chunk's; 0 if the cast does not give such. */
static Py_ssize_t base_width(Py_ssize_t width, int cast)
{
    if (cast == CAST_NONE)
        return width;
    if (cast == CAST_F32_BF16 || cast == CAST_F32_F16)
        return width == 2 ? 4 : 0;
    return cast == CAST_F64_F32 && width == 4 ? 8 : 0;
}

/* Elements of a chunk that fits its base exactly; -1 if it does not, or the parameters are out of range. */
static Py_ssize_t fitting(const Py_buffer *data, const Py_buffer *base, Py_ssize_t width, int map, int cast)
{
    Py_ssize_t n;
    if ((width != 1 && width != 2 && width != 4 && width != 8) || map < MAP_INT || map > MAP_RSUB ||
        cast < CAST_NONE || cast >= N_CASTS || !base_width(width, cast) || data->len % width)
        return -1;
    n = data->len / width;
    return base->len % base_width(width, cast) == 0 && base->len / base_width(width, cast) == n ? n : -1;
}

/* Far from the ends, so that what scaled32 and scaled64 let through stays far from them too. */
static int is_scale(float scale)
{
    return scale > 0.015625f && scale < 2.0f;
}

static PyObject *bad_delta(void)
{
    PyErr_SetString(PyExc_ValueError, "delta: parameters out of range, sizes do not match, or buffers overlap");
    return NULL;
}

#define BY_WIDTH(CALL, ...)                                                                                        \
    (width == 1 ? CALL##_1(__VA_ARGS__)                                                                            \
     : width == 2 ? CALL##_2(__VA_ARGS__)                                                                          \
     : width == 4 ? CALL##_4(__VA_ARGS__)                                                                          \
                  : CALL##_8(__VA_ARGS__))

/* Buffers of an element type that fit each other. */
typedef struct {
    const uint8_t *data, *base;
    uint8_t *out;
    size_t n, out_size;
    Py_ssize_t width, sparse_max;
    int map, cast;
    float scale;
} pair;

/* What became of a pair: nothing if `changed` elements are few enough, else its differences in `out`. */
typedef struct {
    size_t changed;
    int is_sparse, fits;
    classes of;
    double data_bits, bits[N_PLANES_MAX];
} grouped;

static void group_pair(const pair *p, const int64_t *logs, size_t n_samples, grouped *found)
{
    Py_ssize_t width = p->width;
    int64_t counts[9];
    uint8_t *plane;
    size_t c, l, k = 0, size;
    found->fits = found->is_sparse = 0;
    if (p->sparse_max >= 0) {
        found->changed = BY_WIDTH(count_changed, p->data, p->base, p->n, p->cast, (size_t)p->sparse_max);
        found->is_sparse = found->changed <= (size_t)p->sparse_max;
        if (found->is_sparse)
            return;
    }
    BY_WIDTH(delta_lengths, p->data, p->base, p->n, p->map, p->cast, p->scale, counts);
    classify(counts, (size_t)width, &found->of);
    size = digits_size(found->of.n, p->n);
    plane = p->out;
    for (c = 0; c < found->of.n; c++)
        size += found->of.lengths[c] * found->of.counts[c];
    if (size > p->out_size)
        return;
    /* Zero if the data changed since it was counted. */
    found->fits = BY_WIDTH(delta_group, p->data, p->base, p->n, p->map, p->cast, p->scale, &found->of, p->out);
    found->data_bits = sampled(p->data, p->n * (size_t)width, logs, n_samples);
    for (c = 0; c <= found->of.n; c++) { /* the classes' digits, then the planes of each */
        for (l = 0; l < (c ? found->of.lengths[c - 1] : found->of.n > 1); l++) {
            size = c ? found->of.counts[c - 1] : digits_size(found->of.n, p->n);
            found->bits[k++] = sampled(plane, size, logs, n_samples);
            plane += size;
        }
    }
}

/* The number that changed, or ({length: elements}, bits of each plane, bits of the data). */
static PyObject *grouped_as_object(const grouped *g)
{
    PyObject *of, *bits, *value;
    size_t c, n_planes = g->of.n > 1;
    if (g->is_sparse)
        return PyLong_FromSize_t(g->changed);
    of = PyDict_New();
    for (c = 0; of && c < g->of.n; c++) {
        PyObject *length = PyLong_FromSize_t(g->of.lengths[c]), *count = PyLong_FromSize_t(g->of.counts[c]);
        if (!length || !count || PyDict_SetItem(of, length, count) < 0)
            Py_CLEAR(of);
        Py_XDECREF(length);
        Py_XDECREF(count);
        n_planes += g->of.lengths[c];
    }
    bits = as_floats(g->bits, n_planes);
    value = of && bits ? Py_BuildValue("OOd", of, bits, g->data_bits) : NULL;
    Py_XDECREF(of);
    Py_XDECREF(bits);
    return value;
}

static PyObject *py_delta_group(PyObject *self, PyObject *args)
{
    PyObject *given, *found = NULL;
    Py_buffer table;
    Py_ssize_t n_samples, n_pairs, i;
    pair *pairs;
    grouped *groups;
    held all;
    int ok;
    (void)self;
    if (!PyArg_ParseTuple(args, "O!y*n:delta_group", &PyTuple_Type, &given, &table, &n_samples))
        return NULL;
    n_pairs = PyTuple_Size(given);
    pairs = PyMem_Calloc((size_t)n_pairs + 1, sizeof *pairs);
    groups = PyMem_Calloc((size_t)n_pairs + 1, sizeof *groups);
    ok = hold(&all, 3 * n_pairs) && pairs && groups;
    if (!ok)
        PyErr_NoMemory();
    else if (n_samples < 1 || (size_t)n_samples >= n_logs(&table)) {
        bad_delta();
        ok = 0;
    }
    for (i = 0; ok && i < n_pairs; i++) {
        PyObject *data_of, *base_of, *out_of;
        const Py_buffer *data, *base, *out;
        pair *p = &pairs[i];
        Py_ssize_t n;
        ok = PyArg_ParseTuple(PyTuple_GetItem(given, i), "OOOniifn:delta_group", &data_of, &base_of, &out_of,
                              &p->width, &p->map, &p->cast, &p->scale, &p->sparse_max) &&
             (data = take_buffer(&all, data_of, PyBUF_SIMPLE)) && (base = take_buffer(&all, base_of, PyBUF_SIMPLE)) &&
             (out = take_buffer(&all, out_of, PyBUF_WRITABLE));
        if (!ok)
            break;
        n = fitting(data, base, p->width, p->map, p->cast);
        ok = n >= 0 && is_scale(p->scale) && !overlap(data, out) && !overlap(base, out);
        if (!ok)
            bad_delta();
        p->data = data->buf;
        p->base = base->buf;
        p->out = out->buf;
        p->out_size = (size_t)out->len;
        p->n = (size_t)n;
    }
    if (ok) {
        Py_BEGIN_ALLOW_THREADS
        for (i = 0; i < n_pairs; i++)
            group_pair(&pairs[i], table.buf, (size_t)n_samples, &groups[i]);
        Py_END_ALLOW_THREADS
        found = PyList_New(n_pairs);
    }
    for (i = 0; found && i < n_pairs; i++) {
        PyObject *one = groups[i].fits || groups[i].is_sparse ? grouped_as_object(&groups[i]) : bad_delta();
        if (!one || PyList_SetItem(found, i, one) < 0)
            Py_CLEAR(found);
    }
    PyMem_Free(pairs);
    PyMem_Free(groups);
    let_go(&all);
    PyBuffer_Release(&table);
    return found;
}

/* Fill `of` from {length: elements}, ascending, of n elements; returns bytes of all planes, -1 if they do not fit. */
static Py_ssize_t parse_classes(PyObject *given, Py_ssize_t width, Py_ssize_t n, classes *of)
{
    Py_ssize_t size, i, sum = 0, last = -1;
    PyObject *items = PyDict_Items(given);
    if (!items)
        return -1;
    of->n = (size_t)PyList_Size(items);
    if (of->n < 1 || of->n > N_CLASSES_MAX || of->n > (size_t)width + 1) {
        Py_DECREF(items);
        return -1;
    }
    size = (Py_ssize_t)digits_size(of->n, (size_t)n);
    for (i = 0; i < (Py_ssize_t)of->n; i++) {
        Py_ssize_t length, count;
        if (!PyArg_ParseTuple(PyList_GetItem(items, i), "nn", &length, &count) || length <= last || length > width ||
            count < 0 || count > n - sum)
            break;
        of->lengths[i] = (uint8_t)length;
        of->counts[i] = (size_t)count;
        sum += count;
        size += length * count;
        last = length;
    }
    Py_DECREF(items);
    return i == (Py_ssize_t)of->n && sum == n ? size : -1;
}

/* Differences to put back: the planes of each, and what `grouped` was given. */
typedef struct {
    const uint8_t *planes[N_PLANES_MAX], *base;
    uint8_t *out;
    size_t n;
    Py_ssize_t width;
    classes of;
    int map, cast, fits;
    float scale;
} planed;

/* Fill `p` from the planes of a tuple, None being zeros, that must be as many and as large as its classes say. */
static int parse_planes(PyObject *given, const Py_buffer *out, held *all, planed *p)
{
    Py_ssize_t k = 0;
    size_t c, l;
    for (c = 0; c <= p->of.n; c++) { /* the classes' digits, then the planes of each */
        for (l = 0; l < (c ? p->of.lengths[c - 1] : p->of.n > 1); l++, k++) {
            size_t size = c ? p->of.counts[c - 1] : digits_size(p->of.n, p->n);
            PyObject *one = k < PyTuple_Size(given) ? PyTuple_GetItem(given, k) : NULL;
            const Py_buffer *plane;
            if (one == Py_None)
                continue;
            plane = one ? take_buffer(all, one, PyBUF_SIMPLE) : NULL;
            if (!plane || (size_t)plane->len != size || overlap(plane, out))
                return 0;
            p->planes[k] = plane->buf;
        }
    }
    return k == PyTuple_Size(given);
}

/* Buffers of all items: base, out, and as many planes as the tuple in front has. */
static Py_ssize_t count_buffers(PyObject *given)
{
    Py_ssize_t i, n = 0;
    for (i = 0; i < PyTuple_Size(given); i++) {
        PyObject *item = PyTuple_GetItem(given, i);
        PyObject *planes = PyTuple_Check(item) && PyTuple_Size(item) > 0 ? PyTuple_GetItem(item, 0) : NULL;
        n += 2 + (planes && PyTuple_Check(planes) ? PyTuple_Size(planes) : 0);
    }
    return n;
}

static PyObject *py_delta_ungroup(PyObject *self, PyObject *args)
{
    PyObject *given, *found = NULL;
    Py_ssize_t n_all, i;
    planed *all_planed;
    held all;
    int ok;
    (void)self;
    if (!PyArg_ParseTuple(args, "O!:delta_ungroup", &PyTuple_Type, &given))
        return NULL;
    n_all = PyTuple_Size(given);
    all_planed = PyMem_Calloc((size_t)n_all + 1, sizeof *all_planed);
    ok = hold(&all, count_buffers(given)) && all_planed;
    if (!ok)
        PyErr_NoMemory();
    for (i = 0; ok && i < n_all; i++) {
        PyObject *planes, *base_of, *out_of, *sizes;
        const Py_buffer *base, *out;
        planed *p = &all_planed[i];
        Py_ssize_t n;
        ok = PyArg_ParseTuple(PyTuple_GetItem(given, i), "O!OOniifO!:delta_ungroup", &PyTuple_Type, &planes, &base_of,
                              &out_of, &p->width, &p->map, &p->cast, &p->scale, &PyDict_Type, &sizes) &&
             (base = take_buffer(&all, base_of, PyBUF_SIMPLE)) && (out = take_buffer(&all, out_of, PyBUF_WRITABLE));
        if (!ok)
            break;
        n = fitting(out, base, p->width, p->map, p->cast);
        p->base = base->buf;
        p->out = out->buf;
        p->n = (size_t)n;
        ok = n >= 0 && is_scale(p->scale) && parse_classes(sizes, p->width, n, &p->of) >= 0 && !overlap(base, out) &&
             parse_planes(planes, out, &all, p);
        if (!ok && !PyErr_Occurred())
            bad_delta();
    }
    if (ok) {
        Py_BEGIN_ALLOW_THREADS
        for (i = 0; i < n_all; i++) {
            planed *p = &all_planed[i];
            Py_ssize_t width = p->width;
            int many = p->of.n > 1;
            p->fits = BY_WIDTH(delta_ungroup, many ? p->planes[0] : NULL, p->planes + many, p->base, p->out, p->n,
                               p->map, p->cast, p->scale, &p->of);
        }
        Py_END_ALLOW_THREADS
        found = PyList_New(n_all);
    }
    for (i = 0; found && i < n_all; i++)
        if (PyList_SetItem(found, i, PyBool_FromLong(all_planed[i].fits)) < 0)
            Py_CLEAR(found);
    PyMem_Free(all_planed);
    let_go(&all);
    return found;
}

static PyObject *py_sparse_take(PyObject *self, PyObject *args)
{
    Py_buffer data, base, places, packed;
    Py_ssize_t width, n;
    size_t n_places = SIZE_MAX;
    int map, cast, bitmap;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*y*w*w*niip:sparse_take", &data, &base, &places, &packed, &width, &map, &cast,
                          &bitmap))
        return NULL;
    n = fitting(&data, &base, width, map, cast);
    if (n >= 0 && packed.len % width == 0 && !overlap(&places, &packed) && !overlap(&data, &places) &&
        !overlap(&data, &packed) && !overlap(&base, &places) && !overlap(&base, &packed)) {
        Py_BEGIN_ALLOW_THREADS
        n_places = BY_WIDTH(sparse_take, data.buf, base.buf, (size_t)n, map, cast, bitmap, places.buf,
                            (size_t)places.len, packed.buf, (size_t)(packed.len / width));
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&data);
    PyBuffer_Release(&base);
    PyBuffer_Release(&places);
    PyBuffer_Release(&packed);
    return n_places == SIZE_MAX ? bad_delta() : PyLong_FromSize_t(n_places);
}

static PyObject *py_sparse_put(PyObject *self, PyObject *args)
{
    Py_buffer base, out, places, packed;
    Py_ssize_t width, n;
    int map, cast, bitmap, ok = 0;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*w*y*y*niip:sparse_put", &base, &out, &places, &packed, &width, &map, &cast,
                          &bitmap))
        return NULL;
    n = fitting(&out, &base, width, map, cast);
    if (n >= 0 && packed.len % width == 0 && !overlap(&base, &out) && !overlap(&places, &out) &&
        !overlap(&packed, &out)) {
        Py_BEGIN_ALLOW_THREADS
        ok = BY_WIDTH(sparse_put, base.buf, out.buf, (size_t)n, map, cast, bitmap, places.buf, (size_t)places.len,
                      packed.buf, (size_t)(packed.len / width));
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&base);
    PyBuffer_Release(&out);
    PyBuffer_Release(&places);
    PyBuffer_Release(&packed);
    return n < 0 ? bad_delta() : PyBool_FromLong(ok);
}

/* ---- module --------------------------------------------------------------------------------------------------- */

/* The instruction set of the clones that run here, "" where there is only one build. */
static PyObject *py_isa(PyObject *self, PyObject *args)
{
    const char *name = "";
    (void)self;
    (void)args;
#ifdef HAVE_CLONES
    __builtin_cpu_init();
    name = __builtin_cpu_supports("x86-64-v4")   ? "x86-64-v4"
           : __builtin_cpu_supports("x86-64-v3") ? "x86-64-v3"
                                                 : "x86-64";
#endif
    return PyUnicode_FromString(name);
}

static PyMethodDef methods[] = {
    {"cut", py_cut, METH_VARARGS, "cut(data, ends, align, min_size, max_size, threshold) -> n_ends"},
    {"split_planes", py_split_planes, METH_VARARGS, "split_planes(data, planes, itemsize, rotate)"},
    {"join_planes", py_join_planes, METH_VARARGS, "join_planes(planes, out, itemsize, rotate)"},
    {"entropies", py_entropies, METH_VARARGS, "entropies(planes, table, n_samples) -> list of float"},
    {"are_equal", py_are_equal, METH_VARARGS, "are_equal(left, right) -> list of bool"},
    {"move", py_move, METH_VARARGS, "move(of (out, offset, source) each)"},
    {"split_all", py_split_all, METH_VARARGS,
     "split_all(of (data, planes, itemsize, rotate) each, table, n_samples) -> list of lists of float"},
    {"delta_group", py_delta_group, METH_VARARGS,
     "delta_group(of (data, base, out, itemsize, map, cast, scale, sparse_max) each, table, n_samples) -> list"},
    {"delta_ungroup", py_delta_ungroup, METH_VARARGS,
     "delta_ungroup(of (planes, base, out, itemsize, map, cast, scale, classes) each) -> list of bool"},
    {"sparse_take", py_sparse_take, METH_VARARGS,
     "sparse_take(data, base, places, packed, itemsize, map, cast, bitmap) -> n_places"},
    {"sparse_put", py_sparse_put, METH_VARARGS,
     "sparse_put(base, out, places, packed, itemsize, map, cast, bitmap) -> bool"},
    {"isa", py_isa, METH_NOARGS, "isa() -> str"},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef module = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "deltackpt._kernels",
    .m_doc = "Compiled kernels; call them through deltackpt.kernels.",
    .m_size = 0,
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__kernels(void)
{
    return PyModuleDef_Init(&module);
}
