// The vector layer: what the portable sources need of an instruction set, on top of the vector
// types that gcc and clang share. An isa_*.cpp file defines TERDIT_LANES, includes this header,
// adds its own `fma` and dot products, and includes kernels.inc.
//
// Everything that an isa_*.cpp file includes is in an unnamed namespace and uses no library
// templates: a function shared between two files would be compiled for the better of the two
// instruction sets and then called on CPUs that lack it.
#ifndef TERDIT_SIMD_H
#define TERDIT_SIMD_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define TERDIT_INLINE inline __attribute__((always_inline))
#define TERDIT_INLINE_LAMBDA __attribute__((always_inline))

namespace {

constexpr int kLanes = TERDIT_LANES;  // float32 values in a vector: 4, 8 or 16

typedef float vf __attribute__((vector_size(TERDIT_LANES * 4)));
typedef int32_t vi __attribute__((vector_size(TERDIT_LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(TERDIT_LANES * 4)));
typedef int8_t vb __attribute__((vector_size(TERDIT_LANES)));

TERDIT_INLINE vf load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

TERDIT_INLINE void store(float *p, vf v) { memcpy(p, &v, sizeof v); }

// The first n < kLanes values, then zeros.
TERDIT_INLINE vf load_part(const float *p, int64_t n) {
    vf v = {};
    memcpy(&v, p, size_t(n) * 4);
    return v;
}

TERDIT_INLINE void store_part(float *p, vf v, int64_t n) { memcpy(p, &v, size_t(n) * 4); }

TERDIT_INLINE vf splat(float x) { return x - vf{}; }
TERDIT_INLINE vi splat_int(int32_t x) { return x - vi{}; }

TERDIT_INLINE vi bits(vf v) { return (vi)v; }
TERDIT_INLINE vf to_float(vi v) { return __builtin_convertvector(v, vf); }
TERDIT_INLINE vb to_bytes(vi v) { return __builtin_convertvector(v, vb); }

TERDIT_INLINE vi max(vi a, vi b) { return a > b ? a : b; }
TERDIT_INLINE vf max(vf a, vf b) { return a > b ? a : b; }

// Rounds to the nearest integer, half to even, for |v| < 2^22: adding 1.5 * 2^23 leaves no bits
// for a fraction, and the sum's low bits are the integer.
TERDIT_INLINE vi round_to_int(vf v) {
    const vf magic = splat(12582912.0f);
    return bits(v + magic) - bits(magic);
}

TERDIT_INLINE float sum_lanes(vf v) {
    float sum = 0;
    for (int i = 0; i < kLanes; i++) sum += v[i];
    return sum;
}

TERDIT_INLINE int32_t sum_lanes(vi v) {
    int32_t sum = 0;
    for (int i = 0; i < kLanes; i++) sum += v[i];
    return sum;
}

TERDIT_INLINE float max_lanes(vf v) {
    float most = v[0];
    for (int i = 1; i < kLanes; i++) most = v[i] > most ? v[i] : most;
    return most;
}

TERDIT_INLINE int32_t max_lanes(vi v) {
    int32_t most = v[0];
    for (int i = 1; i < kLanes; i++) most = v[i] > most ? v[i] : most;
    return most;
}

// The lanes of v at `index`; the four values of two 4-vectors at constant places.
#if defined(__clang__)
TERDIT_INLINE vf shuffle(vf v, vi index) {
    vf out;
    for (int i = 0; i < kLanes; i++) out[i] = v[index[i]];
    return out;
}
#define shuffle2(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
TERDIT_INLINE vf shuffle(vf v, vi index) { return __builtin_shuffle(v, index); }
#define shuffle2(a, b, i, j, k, l) __builtin_shuffle(a, b, (i4){i, j, k, l})
#endif

// v with zeros from lane n on.
TERDIT_INLINE vf first_lanes(vf v, int64_t n) {
    for (int64_t i = n; i < kLanes; i++) v[i] = 0.0f;
    return v;
}

// e^x, relative error below 2^-22: x = (n + f) ln 2 with |f| <= 1/2, 2^f by its Taylor polynomial
// (the first term left out, (ln 2 / 2)^8 / 8!, is below 6e-9), 2^n by its exponent bits. Arguments
// below -87 give 1.6e-38 and above 88 give 1.6e38; NaN gives NaN.
TERDIT_INLINE vf exp(vf x) {
    x = x < splat(-87.0f) ? splat(-87.0f) : x;
    x = x > splat(88.0f) ? splat(88.0f) : x;
    const vf magic = splat(12582912.0f);
    const vf n = (x * 1.44269504f + magic) - magic;
    // ln 2 in two parts: n times the first is exact for |n| < 2^9.
    const vf r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    vf p = splat(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return (vf)(bits(p) + (bits(n + magic) - bits(magic)) * (1 << 23));
}

TERDIT_INLINE vf silu(vf x) { return x / (1.0f + exp(-x)); }

// The nearest bfloat16, half to even, as float32. NaN stays NaN: the quiet bit is set first, and
// the rounding cannot carry out of a quiet NaN whose low half is cleared.
TERDIT_INLINE vf round_to_bf16(vf v) {
    const vu u = (vu)v;
    const vu rounded = (u + 0x7fff + ((u >> 16) & 1)) & 0xffff0000u;
    const vu quiet = (u & 0xffff0000u) | 0x00400000u;
    return (vf)((v != v) ? quiet : rounded);
}

}  // namespace

#endif
