// Rows of activations: their sources (plain, normed and modulated, SiLU) and their formats
// (float32, bfloat16, one or two planes of int8).
//
// Integer kinds: step = max(absmax, 1e-5) / L and u = rint(x * (1 / max(absmax, 1e-5) * L)) with
// L = 127 or 32512, every operation rounded to float32, as model/ternary.py defines it. The
// product is at most L (1 + 2^-24)^3, so |u| <= L. 32512 = 127 * 256 keeps both planes of
// u = 256 high + low in int8: high = floor((u + 128) / 256) is at most 127, low in -128..127.
#ifndef TERDIT_ACTIVATIONS_H
#define TERDIT_ACTIVATIONS_H

#include "kernels.h"
#include "simd.h"

namespace {

constexpr float kSmallestAbsmax = 1e-5f;
constexpr int32_t kInfinityBits = 0x7f800000;

// The largest |x| of a row as float bits: these order like the numbers, NaN above infinity.
TERDIT_INLINE int32_t absmax_bits(const float *x, int64_t k) {
    const vi magnitude = splat_int(0x7fffffff);
    vi most = {}, most2 = {};
    int64_t i = 0;
    for (; i + 2 * kLanes <= k; i += 2 * kLanes) {
        most = max(most, bits(load(x + i)) & magnitude);
        most2 = max(most2, bits(load(x + i + kLanes)) & magnitude);
    }
    for (; i + kLanes <= k; i += kLanes) most = max(most, bits(load(x + i)) & magnitude);
    if (i < k) most2 = max(most2, bits(load_part(x + i, k - i)) & magnitude);
    return max_lanes(max(most, most2));
}

TERDIT_INLINE void store_bytes(int8_t *p, vi v) {
    const vb b = to_bytes(v);
    memcpy(p, &b, sizeof b);
}

// One vector of u. The low plane is u's lowest byte: u - 256 high lies in -128..127. With two
// planes the sums are those of u and of high.
template <int kPlanes>
TERDIT_INLINE void quantise(vf scaled, int8_t *high, int8_t *low, vi *sum, vi *sum_high) {
    const vi u = round_to_int(scaled);
    *sum += u;
    if (kPlanes == 1) return store_bytes(high, u);
    const vi h = (u + 128) >> 8;
    *sum_high += h;
    store_bytes(high, h);
    store_bytes(low, u);
}

// Sums of the planes from the sums of `quantise`.
template <int kPlanes>
TERDIT_INLINE void plane_sums(vi sum, vi sum_high, int32_t *high, int32_t *low) {
    const int32_t all = sum_lanes(sum);
    *high = kPlanes == 1 ? all : sum_lanes(sum_high);
    if (kPlanes == 2) *low = all - 256 * *high;
}

// One row of x [K] to integers. The planes' padding is zeroed: stride is a multiple of kLanes.
template <int kPlanes>
TERDIT_INLINE void quantise_row(const float *x, const Activations &to, int64_t m) {
    constexpr float limit = kPlanes == 1 ? 127.0f : 32512.0f;
    const int64_t k = to.k;
    const int64_t groups = to.grouped ? (k + kGroup - 1) / kGroup : 1;
    const int64_t span = to.grouped ? kGroup : k;
    int8_t *high = to.bytes + kPlanes * m * to.stride, *low = high + to.stride;
    int32_t *minus_sums = to.minus_sums + kPlanes * m * groups;
    const int32_t most_bits = absmax_bits(x, k);
    float most;
    memcpy(&most, &most_bits, 4);
    if (most_bits >= kInfinityBits) {
        memset(high, 0, size_t(kPlanes * to.stride));
        memset(minus_sums, 0, size_t(kPlanes * groups) * 4);
        to.steps[m] = __builtin_nanf("");
        return;
    }
    most = most > kSmallestAbsmax ? most : kSmallestAbsmax;
    to.steps[m] = most / limit;
    const vf inverse = splat(1.0f / most * limit);
    for (int64_t g = 0; g < groups; g++) {
        const int64_t end = (g + 1) * span < k ? (g + 1) * span : k;
        vi sum = {}, sum_high = {};
        int64_t i = g * span;
#pragma GCC unroll 4
        for (; i + kLanes <= end; i += kLanes)
            quantise<kPlanes>(load(x + i) * inverse, high + i, low + i, &sum, &sum_high);
        if (i < end)
            quantise<kPlanes>(load_part(x + i, end - i) * inverse, high + i, low + i, &sum,
                              &sum_high);
        int32_t high_sum, low_sum;
        plane_sums<kPlanes>(sum, sum_high, &high_sum, &low_sum);
        minus_sums[g] = -high_sum;
        if (kPlanes == 2) minus_sums[groups + g] = -low_sum;
    }
    const int64_t written = (k + kLanes - 1) / kLanes * kLanes;
    memset(high + written, 0, size_t(to.stride - written));
    if (kPlanes == 2) memset(low + written, 0, size_t(to.stride - written));
}

void round_row_to_bf16(const float *x, float *out, int64_t k) {
    int64_t i = 0;
    for (; i + kLanes <= k; i += kLanes) store(out + i, round_to_bf16(load(x + i)));
    if (i < k) store_part(out + i, round_to_bf16(load_part(x + i, k - i)), k - i);
}

void halve_row(const float *x, uint16_t *out, int64_t k, int64_t stride) {
    int64_t i = 0;
    for (; i < k; i += kLanes) {
        const vf v = i + kLanes <= k ? load(x + i) : load_part(x + i, k - i);
        const vu u = (vu)round_to_bf16(v) >> 16;
        for (int lane = 0; lane < kLanes && i + lane < stride; lane++)
            out[i + lane] = uint16_t(u[lane]);
    }
    for (; i < stride; i++) out[i] = 0;
}

float inverse_rms(const float *x, int64_t n, float eps) {
    vf sum = {}, sum2 = {};
    int64_t i = 0;
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
        const vf a = load(x + i), b = load(x + i + kLanes);
        sum = fma(a, a, sum);
        sum2 = fma(b, b, sum2);
    }
    for (; i < n; i += kLanes) {
        const vf a = i + kLanes <= n ? load(x + i) : load_part(x + i, n - i);
        sum = fma(a, a, sum);
    }
    return 1.0f / __builtin_sqrtf(sum_lanes(sum + sum2) / float(n) + eps);
}

void modulate_row(const Prepare *job, int64_t m, float *out) {
    const int64_t k = job->to.k;
    const float *x = job->x + m * k, *weight = job->norm_weight;
    const float *modulation = job->modulations[m / job->tokens];
    const float *shift = modulation + job->shift_at, *scale = modulation + job->scale_at;
    const vf r = splat(inverse_rms(x, k, job->eps));
    int64_t i = 0;
    for (; i + kLanes <= k; i += kLanes)
        store(out + i, load(x + i) * r * load(weight + i) * (1.0f + load(scale + i)) +
                           load(shift + i));
    if (i < k) {
        const int64_t n = k - i;
        const vf y = load_part(x + i, n) * r * load_part(weight + i, n) *
                         (1.0f + load_part(scale + i, n)) +
                     load_part(shift + i, n);
        store_part(out + i, y, n);
    }
}

void silu_row(const float *x, float *out, int64_t k) {
    int64_t i = 0;
    for (; i + kLanes <= k; i += kLanes) store(out + i, silu(load(x + i)));
    if (i < k) store_part(out + i, silu(load_part(x + i, k - i)), k - i);
}

size_t prepare_scratch(int64_t k) { return size_t(k) * sizeof(float); }

void prepare(const Prepare *job, int64_t m, void *scratch) {
    const Activations &to = job->to;
    const bool stays_float = to.kind == TERDIT_FP32;
    const float *row = job->x + m * to.k;
    if (job->source != kPlain) {
        float *made = stays_float ? job->floats + m * to.k : static_cast<float *>(scratch);
        if (job->source == kModulated)
            modulate_row(job, m, made);
        else
            silu_row(row, made, to.k);
        row = made;
    }
    if (to.kind == TERDIT_INT8)
        quantise_row<1>(row, to, m);
    else if (to.kind == TERDIT_INT16)
        quantise_row<2>(row, to, m);
    else if (to.halves_in_use)
        halve_row(row, to.halves + m * to.stride, to.k, to.stride);
    else if (to.kind == TERDIT_BF16)
        round_row_to_bf16(row, job->floats + m * to.k, to.k);
}

void rms_norm(float *x, const float *weight, int64_t n, float eps) {
    const vf r = splat(inverse_rms(x, n, eps));
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(x + i, load(x + i) * r * load(weight + i));
    if (i < n) store_part(x + i, load_part(x + i, n - i) * r * load_part(weight + i, n - i), n - i);
}

}  // namespace

#endif
