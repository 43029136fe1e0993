// AVX-VNNI: vpdpbusd on 256 bits (Intel Alder Lake and later desktop and laptop CPUs).
#include "isa_x86_256.h"

namespace {

constexpr bool kDotsAnyBytes = true;

const char *const kName = "avxvnni";

double peak(const char *what, int64_t rounds) {
    if (strcmp(what, "int8") != 0) return peak_fp32(rounds);
    TERDIT_PEAK_LOOP("%{vex%} vpdpbusd");
    return double(rounds) * 12 * 64;
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
                total[r][v] =
                    (vi)(Code(-1) > 0  // the unsigned operand comes first
                             ? _mm256_dpbusd_avx_epi32((__m256i)total[r][v], columns[v], value)
                             : _mm256_dpbusd_avx_epi32((__m256i)total[r][v], value, columns[v]));
        }
    }
    finish(total);
}

}  // namespace

#define TERDIT_TABLE terdit_kernels_avxvnni
#include "kernels.inc"
