// LayerNorm over all heads of a row of q or k at once, then the rotary embedding of its pairs
// (2j, 2j + 1): even' = even cos - odd sin, odd' = even sin + odd cos (RoFormer, arXiv 2104.09864).
#ifndef TERDIT_ROTATE_H
#define TERDIT_ROTATE_H

#include "kernels.h"
#include "simd.h"

namespace {

void layer_norm(float *x, const float *weight, const float *bias, int64_t n, float eps) {
    vf sum = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) sum += load(x + i);
    if (i < n) sum += load_part(x + i, n - i);
    const float mean = sum_lanes(sum) / float(n);
    vf squares = {};
    for (i = 0; i + kLanes <= n; i += kLanes) {
        const vf d = load(x + i) - mean;
        squares = fma(d, d, squares);
    }
    float rest = 0;
    for (; i < n; i++) rest += (x[i] - mean) * (x[i] - mean);
    const float scale = 1.0f / __builtin_sqrtf((sum_lanes(squares) + rest) / float(n) + eps);
    for (i = 0; i + kLanes <= n; i += kLanes)
        store(x + i, (load(x + i) - mean) * scale * load(weight + i) + load(bias + i));
    for (; i < n; i++) x[i] = (x[i] - mean) * scale * weight[i] + bias[i];
}

void rotate_row(float *x, const float *cos, const float *sin, int64_t heads, int64_t head_dim) {
    // Exchanges the two of each pair, and spreads kLanes / 2 cosines over both of their pairs.
    vi exchange, first, second;
    for (int i = 0; i < kLanes; i++) {
        exchange[i] = i ^ 1;
        first[i] = i / 2;
        second[i] = kLanes / 2 + i / 2;
    }
    vi sign;
    for (int i = 0; i < kLanes; i++) sign[i] = i & 1 ? 0 : int32_t(0x80000000u);
    for (int64_t h = 0; h < heads; h++, x += head_dim) {
        int64_t d = 0;
        for (; d + 2 * kLanes <= head_dim; d += 2 * kLanes) {
            const vf c = load(cos + d / 2), s = load(sin + d / 2);
            for (int half = 0; half < 2; half++) {
                const vi spread = half ? second : first;
                float *p = x + d + half * kLanes;
                const vf v = load(p), signed_sin = (vf)(bits(shuffle(s, spread)) ^ sign);
                store(p, v * shuffle(c, spread) + shuffle(v, exchange) * signed_sin);
            }
        }
        for (; d < head_dim; d += 2) {
            const float even = x[d], odd = x[d + 1], c = cos[d / 2], s = sin[d / 2];
            x[d] = even * c - odd * s;
            x[d + 1] = even * s + odd * c;
        }
    }
}

void rotate(const Rotate *job, int64_t m) {
    const int64_t q_width = job->heads * job->head_dim, k_width = job->kv_heads * job->head_dim;
    const int64_t at = m % job->tokens * (job->head_dim / 2);
    float *q = job->q + m * q_width, *k = job->k + m * k_width;
    if (job->q_weight) layer_norm(q, job->q_weight, job->q_bias, q_width, job->eps);
    if (job->k_weight) layer_norm(k, job->k_weight, job->k_bias, k_width, job->eps);
    rotate_row(q, job->cos + at, job->sin + at, job->heads, job->head_dim);
    rotate_row(k, job->cos + at, job->sin + at, job->kv_heads, job->head_dim);
}

}  // namespace

#endif
