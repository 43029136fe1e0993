// AVX2 with FMA: no dot product of bytes, but vpmaddubsw adds pairs of u8 * s8 into 16 bits.
//
// It saturates beyond 32767, and so would the 16-bit running sums: a pair of codes 0..2 times
// -128..127 is at most 2 * 2 * 128 = 512 in size, so 63 of them, 32,256, fit. The sums are widened
// to 32 bits after every kWiden = 63 vectors.
#include "isa_x86_256.h"

namespace {

constexpr bool kDotsAnyBytes = false;

const char *const kName = "avx2";

constexpr int64_t kWiden = 63;

double peak(const char *what, int64_t rounds) {
    if (strcmp(what, "int8") != 0) return peak_fp32(rounds);
    // Two instructions for 32 products: half the rate of either of them alone.
    __m256i chain[6], pairs[6];
    const __m256i one = _mm256_set1_epi8(1), two = _mm256_set1_epi8(2);
#pragma GCC unroll 6
    for (int i = 0; i < 6; i++) chain[i] = one;
    for (int64_t round = 0; round < rounds; round++)
#pragma GCC unroll 6
        for (int i = 0; i < 6; i++) {
            __asm__ volatile("vpmaddubsw %2, %1, %0" : "=x"(pairs[i]) : "x"(one), "x"(two));
            __asm__ volatile("vpaddw %1, %0, %0" : "+x"(chain[i]) : "x"(pairs[i]));
        }
    return double(rounds) * 6 * 64;
}

template <int R, int V, class Byte, class Code, class Start, class Finish>
TERDIT_INLINE void dot_block(const Byte *bytes, ptrdiff_t stride, const Code *tile,
                             int64_t vectors, const Start &start, const Finish &finish) {
    const __m256i ones = _mm256_set1_epi16(1);
    vi total[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) total[r][v] = start(r, v);
    for (int64_t from = 0; from < vectors; from += kWiden) {
        const int64_t end = from + kWiden < vectors ? from + kWiden : vectors;
        __m256i pairs[R][V];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) pairs[r][v] = _mm256_setzero_si256();
        for (int64_t i = from; i < end; i++, bytes += 4, tile += 256) {
            __m256i columns[V];
#pragma GCC unroll 8
            for (int v = 0; v < V; v++)
                columns[v] = _mm256_loadu_si256((const __m256i *)(tile + 32 * v));
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                int32_t four;
                memcpy(&four, bytes + r * stride, 4);
                const __m256i value = _mm256_set1_epi32(four);
#pragma GCC unroll 8
                for (int v = 0; v < V; v++)
                    pairs[r][v] =
                        _mm256_add_epi16(pairs[r][v], _mm256_maddubs_epi16(columns[v], value));
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int v = 0; v < V; v++)
                total[r][v] += (vi)_mm256_madd_epi16(pairs[r][v], ones);
    }
    finish(total);
}

}  // namespace

#define TERDIT_TABLE terdit_kernels_avx2
#include "kernels.inc"
