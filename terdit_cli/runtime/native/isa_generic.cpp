// Plain C++ for any CPU, and the reference for reading the others.
#define TERDIT_LANES 4
#include "simd.h"

namespace {

const char *const kName = "generic";

TERDIT_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }

TERDIT_INLINE vf max(vf a, vf b) { return a > b ? a : b; }
TERDIT_INLINE vf min(vf a, vf b) { return a < b ? a : b; }

constexpr int kFmaVectors = 2;
constexpr int kDotColumns = 16;
constexpr bool kDotsAnyBytes = true;

template <int R, int V, class Byte, class Code, class Start, class Finish>
TERDIT_INLINE void dot_block(const Byte *bytes, ptrdiff_t stride, const Code *tile, int64_t vectors, const Start &start, const Finish &finish) {
    vi total[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) {
            vu sums = (vu)start(r, v);  // modulo 2^32: planes of int16 may wrap on the way
            for (int lane = 0; lane < kLanes; lane++) {
                uint32_t sum = sums[lane];
                for (int64_t i = 0; i < vectors; i++)
                    for (int k = 0; k < 4; k++) {
                        const int code = tile[256 * i + 4 * (v * kLanes + lane) + k];
                        sum += uint32_t(code * bytes[r * stride + 4 * i + k]);
                    }
                sums[lane] = sum;
            }
            total[r][v] = (vi)sums;
        }
    finish(total);
}

double peak(const char *what, int64_t rounds) {
    (void)what;
    vf chain[6];
    for (int i = 0; i < 6; i++) chain[i] = splat(1.0f);
    for (int64_t round = 0; round < rounds; round++)
        for (int i = 0; i < 6; i++) {
            chain[i] = chain[i] * 0.5f + 1.0f;
            __asm__ volatile("" : "+m"(chain[i]));
        }
    return double(rounds) * 6 * 2 * kLanes;
}

}  // namespace

#define TERDIT_TABLE terdit_kernels_generic
#include "kernels.inc"
