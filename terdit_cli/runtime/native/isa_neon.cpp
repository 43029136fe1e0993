// 64-bit ARM with the dot product extension (ARMv8.2-A; Apple M1, Cortex-A76, Neoverse N1, ...).
// Codes are at most 2, so they are the same numbers as signed bytes: sdot.
#include <arm_neon.h>

#define TERDIT_LANES 4
#include "simd.h"

namespace {

const char *const kName = "neon";

TERDIT_INLINE vf fma(vf a, vf b, vf c) {
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}

// Not vmaxq_f32: a NaN in the first operand must not be returned.
TERDIT_INLINE vf max(vf a, vf b) { return a > b ? a : b; }
TERDIT_INLINE vf min(vf a, vf b) { return a < b ? a : b; }

constexpr int kFmaVectors = 4;
constexpr int kDotColumns = 16;
constexpr bool kDotsAnyBytes = false;

double peak(const char *what, int64_t rounds) {
    int32x4_t chain[24];
    const int32x4_t one = vdupq_n_s32(0x01010101), two = vdupq_n_s32(0x02020202);
#pragma GCC unroll 24
    for (int i = 0; i < 24; i++) chain[i] = one;
    if (strcmp(what, "int8") == 0) {
        for (int64_t round = 0; round < rounds; round++)
#pragma GCC unroll 24
            for (int i = 0; i < 24; i++)
                __asm__ volatile("sdot %0.4s, %1.16b, %2.16b"
                                 : "+w"(chain[i])
                                 : "w"(one), "w"(two));
        return double(rounds) * 24 * 32;
    }
    for (int64_t round = 0; round < rounds; round++)
#pragma GCC unroll 24
        for (int i = 0; i < 24; i++)
            __asm__ volatile("fmla %0.4s, %1.4s, %2.4s" : "+w"(chain[i]) : "w"(one), "w"(two));
    return double(rounds) * 24 * 8;
}

template <int R, int V, class Byte, class Code, class Start, class Finish>
TERDIT_INLINE void dot_block(const Byte *bytes, ptrdiff_t stride, const Code *tile,
                             int64_t vectors, const Start &start, const Finish &finish) {
    vi total[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) total[r][v] = start(r, v);
    for (int64_t i = 0; i < vectors; i++, bytes += 4, tile += 256) {
        int8x16_t codes[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) codes[v] = vld1q_s8((const int8_t *)tile + 16 * v);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            int32_t four;
            memcpy(&four, bytes + r * stride, 4);
            const int8x16_t value = vreinterpretq_s8_s32(vdupq_n_s32(four));
#pragma GCC unroll 8
            for (int v = 0; v < V; v++)
                total[r][v] = (vi)vdotq_s32((int32x4_t)total[r][v], codes[v], value);
        }
    }
    finish(total);
}

}  // namespace

#define TERDIT_TABLE terdit_kernels_neon
#include "kernels.inc"
