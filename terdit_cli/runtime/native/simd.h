// The vector layer: what the portable sources need from an instruction set, on top of the vector
// types that gcc and clang share. An isa_*.cpp file defines TERDIT_LANES, includes this header,
// adds its own `fma` and dot products, and includes kernels.inc.
//
// Everything that an isa_*.cpp file includes is in an unnamed namespace and uses no library
// templates: a function shared by two files could be compiled for the newer of the two instruction
// sets and then called on CPUs that lack it.
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

// From the isa_*.cpp file: a * b + c with one rounding where the CPU can; the maximum and the
// minimum of two values, which is the second one if either is a NaN.
TERDIT_INLINE vf fma(vf a, vf b, vf c);
TERDIT_INLINE vf max(vf a, vf b);
TERDIT_INLINE vf min(vf a, vf b);

TERDIT_INLINE vf splat(float x) { return x - vf{}; }
TERDIT_INLINE vi splat_int(int32_t x) { return x - vi{}; }

TERDIT_INLINE vi bits(vf v) { return (vi)v; }
TERDIT_INLINE vf to_float(vi v) { return __builtin_convertvector(v, vf); }
// The lowest byte of each lane, and back. gcc 12 splits some conversions to 16 bytes.
#if TERDIT_LANES == 16
TERDIT_INLINE vb to_bytes(vi v) { return (vb)_mm512_cvtepi32_epi8((__m512i)v); }
TERDIT_INLINE vi from_bytes(vb v) { return (vi)_mm512_cvtepi8_epi32((__m128i)v); }
#else
TERDIT_INLINE vb to_bytes(vi v) { return __builtin_convertvector(v, vb); }
TERDIT_INLINE vi from_bytes(vb v) { return __builtin_convertvector(v, vi); }
#endif

TERDIT_INLINE vi max(vi a, vi b) { return a > b ? a : b; }

// Rounds to the nearest integer, half to even, for |v| < 2^22: adding 1.5 * 2^23 leaves no bits
// for a fraction, and the sum's low bits are the integer.
TERDIT_INLINE vi round_to_int(vf v) {
    const vf magic = splat(12582912.0f);
    return bits(v + magic) - bits(magic);
}

typedef float v4 __attribute__((vector_size(16)));
typedef int32_t i4 __attribute__((vector_size(16)));

// Over all lanes: quarters of the vector by `combine`, then the last four in order.
template <class Four, class Vector, class Combine>
TERDIT_INLINE Four combined_quarters(Vector v, const Combine &combine) {
    Four parts[kLanes / 4];
    memcpy(parts, &v, sizeof v);
    Four all = parts[0];
#pragma GCC unroll 4
    for (int i = 1; i < kLanes / 4; i++) all = combine(all, parts[i]);
    return all;
}

TERDIT_INLINE float sum_lanes(vf v) {
    const v4 s = combined_quarters<v4>(v, [](v4 a, v4 b) { return a + b; });
    return (s[0] + s[2]) + (s[1] + s[3]);
}

TERDIT_INLINE int32_t sum_lanes(vi v) {
    const i4 s = combined_quarters<i4>(v, [](i4 a, i4 b) { return a + b; });
    return s[0] + s[1] + s[2] + s[3];
}

TERDIT_INLINE int32_t max_lanes(vi v) {
    const i4 s = combined_quarters<i4>(v, [](i4 a, i4 b) { return a > b ? a : b; });
    const int32_t low = s[0] > s[1] ? s[0] : s[1], high = s[2] > s[3] ? s[2] : s[3];
    return low > high ? low : high;
}

TERDIT_INLINE float max_lanes(vf v) {
    const v4 s = combined_quarters<v4>(v, [](v4 a, v4 b) { return a > b ? a : b; });
    const float low = s[0] > s[1] ? s[0] : s[1], high = s[2] > s[3] ? s[2] : s[3];
    return low > high ? low : high;
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

// e^x, relative error below 2^-22: x = n ln 2 + r with |r| <= (ln 2) / 2, e^r by the Chebyshev
// interpolation of degree 6 (off by 2e-9), 2^n by its exponent bits. Below -87 it stays at
// 1.6e-38, above 88 at 1.6e38; NaN gives NaN.
TERDIT_INLINE vf exp(vf x) {
    x = min(splat(88.0f), max(splat(-87.0f), x));
    const vf magic = splat(12582912.0f);
    const vf shifted = fma(x, splat(1.44269504f), magic);
    const vf n = shifted - magic;
    // ln 2 in two parts: n times the first is exact for |n| < 2^9.
    const vf r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
    vf p = splat(1.3941108e-3f);
    p = fma(p, r, splat(8.3751264e-3f));
    p = fma(p, r, splat(4.1666353e-2f));
    p = fma(p, r, splat(1.66664155e-1f));
    p = fma(p, r, splat(0.5f));
    p = fma(p, r, splat(1.00000004f));
    p = fma(p, r, splat(1.0f));
    const vu exponent = (vu)bits(shifted) - (vu)bits(magic);
    return (vf)((vu)p + (exponent << 23));
}

// 2^x for -126 <= x <= 88, off by a relative 3e-6, which is the polynomial: x = n + f with
// |f| <= 1/2, 2^f by the Chebyshev interpolation of degree 4.
TERDIT_INLINE vf exp2_coarse(vf x) {
    const vf magic = splat(12582912.0f);
    const vf shifted = x + magic;
    const vf f = x - (shifted - magic);
    vf p = splat(0.0096663685f);
    p = fma(p, f, splat(0.055921976f));
    p = fma(p, f, splat(0.24022349f));
    p = fma(p, f, splat(0.69312105f));
    p = fma(p, f, splat(1.0f));
    // The low 9 bits of `shifted` are n modulo 2^9: all that is left after the shift.
    return (vf)((vu)p + ((vu)shifted << 23));
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
