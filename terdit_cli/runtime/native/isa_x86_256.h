// 256-bit x86: 8 lanes, 16 registers. Shared by isa_avx2.cpp and isa_avxvnni.cpp, which add
// their dot product and compile everything separately.
#ifndef TERDIT_ISA_X86_256_H
#define TERDIT_ISA_X86_256_H

#include <immintrin.h>

#define TERDIT_LANES 8
#include "simd.h"

namespace {

TERDIT_INLINE vf fma(vf a, vf b, vf c) {
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}

TERDIT_INLINE vf max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
TERDIT_INLINE vf min(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }

constexpr int kFmaVectors = 2;
constexpr int kDotColumns = 16;

#define TERDIT_PEAK_LOOP(instruction)                                             \
    __m256i chain[12];                                                            \
    const __m256i one = _mm256_set1_epi8(1), two = _mm256_set1_epi8(2);           \
    _Pragma("GCC unroll 12") for (int i = 0; i < 12; i++) chain[i] = one;         \
    for (int64_t round = 0; round < rounds; round++)                              \
        _Pragma("GCC unroll 12") for (int i = 0; i < 12; i++)                     \
            __asm__ volatile(instruction " %2, %1, %0" : "+x"(chain[i]) : "x"(one), "x"(two));

double peak_fp32(int64_t rounds) {
    TERDIT_PEAK_LOOP("vfmadd231ps");
    return double(rounds) * 12 * 16;
}

}  // namespace

#endif
