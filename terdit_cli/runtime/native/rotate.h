// LayerNorm over all heads of a row of q or k at once, then the rotary embedding of its pairs
// (2j, 2j + 1): even' = even cos - odd sin, odd' = even sin + odd cos (RoFormer, arXiv 2104.09864).
// For quantised attention the heads are then converted to int8, with one step per token and head,
// and stored head by head, contiguously, while here they are pieces of long rows.
#ifndef TERDIT_ROTATE_H
#define TERDIT_ROTATE_H

#include "activations.h"
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

// The first kLanes / 2 values.
TERDIT_INLINE vf load_half(const float *p) {
    vf v = {};
    memcpy(&v, p, sizeof v / 2);
    return v;
}

void rotate_row(float *x, const float *cos, const float *sin, int64_t heads, int64_t head_dim) {
    // Exchanges the two of each pair, and spreads a cosine over both of its pair.
    vi exchange, spread, sign;
    for (int i = 0; i < kLanes; i++) {
        exchange[i] = i ^ 1;
        spread[i] = i / 2;
        sign[i] = i & 1 ? 0 : int32_t(0x80000000u);
    }
    int64_t d = 0;
    for (; d + kLanes <= head_dim; d += kLanes) {
        const vf c = shuffle(load_half(cos + d / 2), spread);
        const vf s = (vf)(bits(shuffle(load_half(sin + d / 2), spread)) ^ sign);
        float *p = x + d;
        for (int64_t h = 0; h < heads; h++, p += head_dim) {
            const vf v = load(p);
            store(p, v * c + shuffle(v, exchange) * s);
        }
    }
    for (; d < head_dim; d += 2) {
        const float c = cos[d / 2], s = sin[d / 2];
        for (float *p = x + d; p < x + heads * head_dim; p += head_dim) {
            const float even = p[0], odd = p[1];
            p[0] = even * c - odd * s;
            p[1] = even * s + odd * c;
        }
    }
}

void quantise_heads(const float *x, int64_t heads, const Rotate *job, int64_t m,
                    const HeadBytes &to) {
    Activations rows = {};
    rows.k = job->head_dim;
    rows.stride = (job->head_dim + kPanel - 1) / kPanel * kPanel;
    rows.bytes = to.bytes;
    rows.steps = to.steps;
    rows.minus_sums = to.minus_sums;
    for (int64_t h = 0; h < heads; h++)
        quantise_row<1>(x + h * job->head_dim, rows,
                        (m / job->tokens * heads + h) * job->tokens + m % job->tokens);
}

void rotate(const Rotate *job, int64_t m) {
    const int64_t q_width = job->heads * job->head_dim, k_width = job->kv_heads * job->head_dim;
    const int64_t at = m % job->tokens * (job->head_dim / 2);
    float *q = job->q + m * q_width, *k = job->k + m * k_width;
    if (job->q_weight) layer_norm(q, job->q_weight, job->q_bias, q_width, job->eps);
    if (job->k_weight) layer_norm(k, job->k_weight, job->k_bias, k_width, job->eps);
    rotate_row(q, job->cos + at, job->sin + at, job->heads, job->head_dim);
    rotate_row(k, job->cos + at, job->sin + at, job->kv_heads, job->head_dim);
    if (!job->quantised) return;
    quantise_heads(q, job->heads, job, m, job->q_bytes);
    quantise_heads(k, job->kv_heads, job, m, job->k_bytes);
    quantise_heads(job->v + m * k_width, job->kv_heads, job, m, job->v_bytes);
}

}  // namespace

#endif
