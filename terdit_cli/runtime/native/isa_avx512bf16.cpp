// AVX-512 with VNNI and BF16: bfloat16 activations stay halves and use vdpbf16ps.
//
// Chosen automatically only on AMD: on Intel's cores vdpbf16ps takes more than twice the time of
// the two float32 multiply-adds that it replaces, so there isa_avx512.cpp is faster in every kind.
#include "isa_avx512.h"

#define TERDIT_HALVES 1

namespace {

const char *const kName = "avx512bf16";

double peak(const char *what, int64_t rounds) {
    if (strcmp(what, "int8") == 0) return peak_int8(rounds);
    if (strcmp(what, "fp32") == 0) return peak_fp32(rounds);
    TERDIT_PEAK_LOOP("vdpbf16ps");
    return double(rounds) * 24 * 64;
}

// Codes [vectors][64] to bfloat16 trits [2 * vectors pairs of k][64 columns][2].
// bfloat16 +1 is 0x3f80 and -1 is 0xbf80: sign and magnitude from the two bits of a code.
void spread_halves(const uint8_t *codes, int64_t vectors, uint16_t *tile) {
    const __m512i one = _mm512_set1_epi16(0x3f80);
    for (int64_t i = 0; i < vectors; i++, codes += 64, tile += 256) {
        const __m512i v = _mm512_loadu_si512(codes);
        for (int pair = 0; pair < 2; pair++) {
            // Bytes 2 pair and 2 pair + 1 of every dword, each widened to a word.
            const __m512i pair_bytes = _mm512_srli_epi32(v, 16 * pair);
            const __m512i words = _mm512_or_si512(
                _mm512_and_si512(pair_bytes, _mm512_set1_epi32(0xff)),
                _mm512_and_si512(_mm512_slli_epi32(pair_bytes, 8), _mm512_set1_epi32(0xff0000)));
            for (int group = 0; group < 4; group++) {
                const __m512i code = _mm512_and_si512(_mm512_srli_epi16(words, 2 * group),
                                                      _mm512_set1_epi16(3));
                const __mmask32 nonzero = _mm512_cmpneq_epi16_mask(code, _mm512_set1_epi16(1));
                const __mmask32 minus = _mm512_cmpeq_epi16_mask(code, _mm512_setzero_si512());
                const __m512i magnitude = _mm512_maskz_mov_epi16(nonzero, one);
                const __m512i sign = _mm512_maskz_mov_epi16(minus, _mm512_set1_epi16(-0x8000));
                const __m512i value = _mm512_or_si512(magnitude, sign);
                _mm512_storeu_si512(tile + pair * 128 + 32 * group, value);
            }
        }
    }
}

template <int R>
TERDIT_INLINE void halves_block(const uint16_t *halves, ptrdiff_t stride, const uint16_t *tile,
                                int64_t pairs, float *sums) {
    __m512 total[R][4];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < 4; v++) total[r][v] = _mm512_loadu_ps(sums + 64 * r + 16 * v);
    for (int64_t i = 0; i < pairs; i++, halves += 2, tile += 128) {
        __m512bh columns[4];
#pragma GCC unroll 8
        for (int v = 0; v < 4; v++) columns[v] = (__m512bh)_mm512_loadu_si512(tile + 32 * v);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            int32_t two;
            memcpy(&two, halves + r * stride, 4);
            const __m512bh value = (__m512bh)_mm512_set1_epi32(two);
#pragma GCC unroll 8
            for (int v = 0; v < 4; v++)
                total[r][v] = _mm512_dpbf16_ps(total[r][v], columns[v], value);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < 4; v++) _mm512_storeu_ps(sums + 64 * r + 16 * v, total[r][v]);
}

}  // namespace

#define TERDIT_TABLE terdit_kernels_avx512bf16
#include "kernels.inc"
