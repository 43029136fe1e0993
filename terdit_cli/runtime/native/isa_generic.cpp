// Plain C++ for any CPU, and the plain version that the others are read against.
#define TERDIT_LANES 4
#include "simd.h"

namespace {

const char *const kName = "generic";

TERDIT_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }

constexpr int kFmaVectors = 2;
constexpr int kDotColumns = 16;

template <int R>
TERDIT_INLINE void dot_block(const int8_t *bytes, ptrdiff_t stride, const uint8_t *tile,
                             int64_t vectors, int32_t *sums) {
    for (int r = 0; r < R; r++)
        for (int n = 0; n < kDotColumns; n++) {
            int32_t sum = 0;
            for (int64_t i = 0; i < vectors; i++)
                for (int k = 0; k < 4; k++)
                    sum += int32_t(tile[256 * i + 4 * n + k]) * bytes[r * stride + 4 * i + k];
            // Modulo 2^32, as the vector instructions: planes of int16 may wrap on the way.
            sums[64 * r + n] = int32_t(uint32_t(sums[64 * r + n]) + uint32_t(sum));
        }
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
