/* The arithmetic of deltackpt on plain byte buffers, as a CPython extension (limited API, Python >= 3.11).
 *
 * Owns   the compiled twin of every kernel in kernels.py, equal to the NumPy one bit for bit.
 * Never  allocates, keeps state, reads a file, or touches a Python object while the GIL is released.
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

/* Both directions: (source, destination, itemsize, rotate) -> None.  fns are for widths 1, 2, 4 and 8. */
static PyObject *planes_call(PyObject *args, const char *format, const planes_fn fns[4])
{
    Py_buffer src, dst;
    Py_ssize_t width;
    int rotate, ok;
    planes_fn fn = NULL;
    if (!PyArg_ParseTuple(args, format, &src, &dst, &width, &rotate))
        return NULL;
    if (width == 1 || width == 2 || width == 4 || width == 8)
        fn = fns[width == 1 ? 0 : width == 2 ? 1 : width == 4 ? 2 : 3];
    ok = fn != NULL && src.len == dst.len && src.len % width == 0 && !overlap(&src, &dst);
    if (ok) {
        Py_BEGIN_ALLOW_THREADS
        fn(src.buf, dst.buf, (size_t)(src.len / width), rotate);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&src);
    PyBuffer_Release(&dst);
    if (!ok) {
        PyErr_SetString(PyExc_ValueError, "planes: itemsize out of range, sizes do not match, or buffers overlap");
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *py_split_planes(PyObject *self, PyObject *args)
{
    static const planes_fn fns[4] = {split_1, split_2, split_4, split_8};
    (void)self;
    return planes_call(args, "y*w*np:split_planes", fns);
}

static PyObject *py_join_planes(PyObject *self, PyObject *args)
{
    static const planes_fn fns[4] = {join_1, join_2, join_4, join_8};
    (void)self;
    return planes_call(args, "y*w*np:join_planes", fns);
}

/* ---- histogram of a strided sample ---------------------------------------------------------------------------- */

/* counts[b] = how often byte b is among data[0], data[step], ...: n_samples of them, all inside data.
 * Two tables, so that a run of one value does not wait for its own last store. */
static void sample_counts(const uint8_t *data, size_t step, size_t n_samples, int64_t counts[256])
{
    int64_t odd[256] = {0};
    size_t i;
    memset(counts, 0, 256 * sizeof(int64_t));
    for (i = 0; i + 2 <= n_samples; i += 2) {
        counts[data[i * step]]++;
        odd[data[(i + 1) * step]]++;
    }
    if (i < n_samples)
        counts[data[i * step]]++;
    for (i = 0; i < 256; i++)
        counts[i] += odd[i];
}

static PyObject *py_histogram(PyObject *self, PyObject *args)
{
    Py_buffer data, counts;
    Py_ssize_t step, n_samples;
    int ok;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*w*nn:histogram", &data, &counts, &step, &n_samples))
        return NULL;
    ok = step >= 1 && n_samples >= 0 && (n_samples == 0 || (data.len >= 1 && (data.len - 1) / step >= n_samples - 1)) &&
         counts.len == 256 * (Py_ssize_t)sizeof(int64_t) && (uintptr_t)counts.buf % sizeof(int64_t) == 0;
    /* The GIL is kept: 4096 samples take 4 us, and a thread that lets go of it waits ten times that to have it back. */
    if (ok)
        sample_counts(data.buf, (size_t)step, (size_t)n_samples, counts.buf);
    PyBuffer_Release(&data);
    PyBuffer_Release(&counts);
    if (!ok) {
        PyErr_SetString(PyExc_ValueError, "histogram: samples outside the data, or counts is not 256 int64");
        return NULL;
    }
    Py_RETURN_NONE;
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
    {"histogram", py_histogram, METH_VARARGS, "histogram(data, counts, step, n_samples)"},
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
