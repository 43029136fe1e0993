// AVX-512 with VNNI: 16 lanes, vpdpbusd. Shared by isa_avx512.cpp and isa_avx512bf16.cpp, which
// compile it separately and keep all of it in their unnamed namespaces.
#ifndef TERDIT_ISA_AVX512_H
#define TERDIT_ISA_AVX512_H

#include <immintrin.h>

#define TERDIT_LANES 16
#include "simd.h"

namespace {

TERDIT_INLINE vf fma(vf a, vf b, vf c) {
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}

TERDIT_INLINE vf max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
TERDIT_INLINE vf min(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }

constexpr int kFmaVectors = 4;
constexpr int kDotColumns = 64;
constexpr bool kDotsAnyBytes = true;

// 24 accumulators, 4 vectors of codes and the broadcast bytes: 29 of 32 registers. Broadcasting
// from memory uses only a load port, so the two dot units limit the loop.
template <int R, int V, class Byte, class Code, class Start, class Finish>
TERDIT_INLINE void dot_block(const Byte *bytes, ptrdiff_t stride, const Code *tile,
                             int64_t vectors, const Start &start, const Finish &finish) {
    vi total[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) total[r][v] = start(r, v);
    for (int64_t i = 0; i < vectors; i++, bytes += 4, tile += 256) {
        __m512i codes[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) codes[v] = _mm512_loadu_si512(tile + 64 * v);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            int32_t four;
            memcpy(&four, bytes + r * stride, 4);
            const __m512i value = _mm512_set1_epi32(four);
#pragma GCC unroll 8
            for (int v = 0; v < V; v++)
                total[r][v] = (vi)(Code(-1) > 0  // the unsigned operand comes first
                                       ? _mm512_dpbusd_epi32((__m512i)total[r][v], codes[v], value)
                                       : _mm512_dpbusd_epi32((__m512i)total[r][v], value, codes[v]));
        }
    }
    finish(total);
}

// One asm statement per instruction keeps the compiler from merging or spilling the 24 chains.
#define TERDIT_PEAK_LOOP(instruction)                                             \
    __m512i chain[24];                                                            \
    const __m512i one = _mm512_set1_epi8(1), two = _mm512_set1_epi8(2);           \
    _Pragma("GCC unroll 24") for (int i = 0; i < 24; i++) chain[i] = one;         \
    for (int64_t round = 0; round < rounds; round++)                              \
        _Pragma("GCC unroll 24") for (int i = 0; i < 24; i++)                     \
            __asm__ volatile(instruction " %2, %1, %0" : "+v"(chain[i]) : "v"(one), "v"(two));

double peak_int8(int64_t rounds) {
    TERDIT_PEAK_LOOP("vpdpbusd");
    return double(rounds) * 24 * 128;
}

double peak_fp32(int64_t rounds) {
    TERDIT_PEAK_LOOP("vfmadd231ps");
    return double(rounds) * 24 * 32;
}

}  // namespace

#endif
