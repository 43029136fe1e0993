// The attention of attention.h on the dot products of bytes, for CPUs that have them for any u8:
// close to float32, not equal.
//
//     scores = (q8 . k8) step_q step_k / sqrt(head_dim)     q8, k8 int8, a step for each token
//     out    = sum(p16 v8) step_v / sum(p16)                v8 int8, a step for each channel
//
// k8 + 128 and v8 + 128 are the unsigned operands, laid out as the byte tiles of gemm.h, so the
// accumulators start at -128 times the sum of the signed ones. Weights p = exp(score - most) lie
// in 0..1 and become p16 = rint(32512 p), two planes of int8, which keeps the many small weights
// of a flat softmax; the denominator is the sum of the same integers.
// Bound: a block of 256 keys adds at most 256 * 32512 * 127 < 2^30 to a sum.
#ifndef TERDIT_ATTENTION_INT8_H
#define TERDIT_ATTENTION_INT8_H

#include "activations.h"
#include "attention.h"
#include "gemm.h"

namespace {

constexpr float kLogWeightLimit = 14.988684f;  // log2(32512)
constexpr float kLogOfE = 1.44269504f;         // log2(e)
constexpr int kOffset = 128;
constexpr int64_t kPlaneRows = 2 * kBlockRows;

struct QuantisedPlace {
    uint8_t *keys;      // [ceil(T / 64)][ceil(head_dim / 4)][256]
    uint8_t *values;    // [ceil(head_dim / 64)][ceil(T / 4)][256]
    float *key_steps;   // [T padded to 64]
    float *value_steps; // [head_dim padded to 64]
    int8_t *q;          // [6][padded]
    int8_t *row;        // [padded]: one quantised key
    float *scores;      // [6][256]
    int8_t *planes;     // [12][256]: high and low of each row's weights
    float *out;         // [6][padded]
    int64_t padded, key_vectors, token_vectors, bytes;
};

QuantisedPlace quantised_place(const Attention *job, void *scratch) {
    QuantisedPlace place;
    char *p = static_cast<char *>(scratch), *start = p;
    const auto take = [&](int64_t bytes) {
        char *here = p;
        p += rounded_up(bytes, 64);
        return here;
    };
    place.padded = rounded_up(job->head_dim, kPanel);
    place.key_vectors = (job->head_dim + 3) / 4;
    place.token_vectors = (job->tokens + 3) / 4;
    const int64_t panels = rounded_up(job->tokens, kPanel) / kPanel;
    place.keys = (uint8_t *)take(panels * place.key_vectors * kTileRow);
    place.values = (uint8_t *)take(place.padded / kPanel * place.token_vectors * kTileRow);
    place.key_steps = (float *)take(panels * kPanel * 4);
    place.value_steps = (float *)take(place.padded * 4);
    place.q = (int8_t *)take(kBlockRows * place.padded);
    place.row = (int8_t *)take(place.padded);
    place.scores = (float *)take(kBlockRows * kKeyBlock * 4);
    place.planes = (int8_t *)take(kPlaneRows * kKeyBlock);
    place.out = (float *)take(kBlockRows * place.padded * 4);
    place.bytes = p - start;
    return place;
}

// A row of n floats to int8; returns the step, NaN if a value is not finite.
float quantise_to(const float *x, int64_t n, int64_t padded, int8_t *to, int32_t *sum) {
    Activations row = {};
    float step;
    int32_t minus_sum;
    row.k = n;
    row.stride = padded;
    row.bytes = to;
    row.steps = &step;
    row.minus_sums = &minus_sum;
    quantise_row<1>(x, row, 0);
    *sum = -minus_sum;
    return step;
}

// Returns 0, or NaN if a key or value is not finite.
float spread_keys(const Attention *job, const float *k, ptrdiff_t stride,
                  const QuantisedPlace &place) {
    float poison = 0;
    memset(place.keys, kOffset,
           size_t(rounded_up(job->tokens, kPanel) / kPanel * place.key_vectors * kTileRow));
    memset(place.key_steps, 0, size_t(rounded_up(job->tokens, kPanel)) * 4);
    for (int64_t t = 0; t < job->tokens; t++) {
        int32_t sum;
        fetch_piece(k, stride, t, job->tokens, job->head_dim);
        place.key_steps[t] = quantise_to(k + t * stride, job->head_dim, place.padded, place.row, &sum);
        poison += place.key_steps[t] * 0.0f;
        uint8_t *tile = place.keys + t / kPanel * place.key_vectors * kTileRow + t % kPanel * 4;
        for (int64_t i = 0; i < place.key_vectors; i++, tile += kTileRow) {
            uint32_t four;
            memcpy(&four, place.row + 4 * i, 4);
            four ^= 0x80808080u;  // + 128 in each byte
            memcpy(tile, &four, 4);
        }
    }
    return poison;
}

TERDIT_INLINE vf load_channels(const float *p, int64_t left) {
    return left >= kLanes ? load(p) : load_part(p, left);
}

float spread_values(const Attention *job, const float *v, ptrdiff_t stride,
                    const QuantisedPlace &place) {
    float poison = 0;
    for (int64_t d = 0; d < place.padded; d += kLanes) {
        const int64_t left = job->head_dim - d;
        uint8_t *tile =
            place.values + (d / kPanel * place.token_vectors) * kTileRow + d % kPanel * 4;
        if (left <= 0) {
            for (int64_t i = 0; i < place.token_vectors; i++)
                memset(tile + i * kTileRow, 0, 4 * kLanes);
            continue;
        }
        vi most = {};
        for (int64_t t = 0; t < job->tokens; t++) {
            if (d == 0) fetch_piece(v, stride, t, job->tokens, job->head_dim);
            most = max(most, bits(load_channels(v + t * stride + d, left)) & 0x7fffffff);
        }
        const vf limit = max((vf)most, splat(kSmallestAbsmax)), inverse = 127.0f / limit;
        store(place.value_steps + d, limit / 127.0f);
        if (max_lanes(most) >= kInfinityBits) poison = __builtin_nanf("");
        for (int64_t t = 0; t < job->tokens; t += 4, tile += kTileRow) {
            vu word = {};
            for (int64_t i = 0; i < 4 && t + i < job->tokens; i++) {
                const vf value = load_channels(v + (t + i) * stride + d, left);
                word |= (vu)(round_to_int(value * inverse) + kOffset) << (8 * uint32_t(i));
            }
            memcpy(tile, &word, sizeof word);
        }
    }
    return poison;
}

// scores [6][256] of the keys from `first` on, times their steps and the rows' `scales`.
void quantised_scores(const QuantisedPlace &place, int64_t first, int64_t keys,
                      const int32_t *starts, const float *scales) {
    for (int64_t s = 0; s < keys; s += kPanel) {
        const uint8_t *tile = place.keys + (first + s) / kPanel * place.key_vectors * kTileRow;
        for (int column = 0; column < kPanel; column += kDotColumns)
            dot_block<kBlockRows, kDotVectors>(
                place.q, place.padded, tile + 4 * column, place.key_vectors,
                [&](int r, int) TERDIT_INLINE_LAMBDA { return splat_int(starts[r]); },
                [&](vi(&totals)[kBlockRows][kDotVectors]) TERDIT_INLINE_LAMBDA {
                    const float *steps = place.key_steps + first + s + column;
                    float *to = place.scores + s + column;
#pragma GCC unroll 8
                    for (int r = 0; r < kBlockRows; r++)
#pragma GCC unroll 8
                        for (int v = 0; v < kDotVectors; v++)
                            store(to + r * kKeyBlock + v * kLanes,
                                  to_float(totals[r][v]) * (load(steps + v * kLanes) * scales[r]));
                });
    }
}

// The weights of row r as planes, from scores that are logarithms to the base 2; returns their
// integer sum and each plane's.
TERDIT_INLINE float quantised_weights(const QuantisedPlace &place, int64_t r, int64_t keys,
                                      float most, int32_t *sums) {
    const float *row = place.scores + r * kKeyBlock;
    int8_t *high = place.planes + 2 * r * kKeyBlock, *low = high + kKeyBlock;
    // 2^(score - most) * 32512, which rounds to 0 below 2^-16: 2^-100 is as good as less.
    const vf shift = splat(kLogWeightLimit - most), least = splat(-100.0f);
    vi sum = {}, sum_high = {};
    int64_t s = 0;
#pragma GCC unroll 2
    for (; s + kLanes <= keys; s += kLanes)
        quantise<2>(exp2_coarse(max(least, load(row + s) + shift)), high + s, low + s, &sum,
                    &sum_high);
    if (s < keys) {
        const vf weight = exp2_coarse(max(least, load(row + s) + shift));
        quantise<2>(first_lanes(weight, keys - s), high + s, low + s, &sum, &sum_high);
    }
    plane_sums<2>(sum, sum_high, &sums[0], &sums[1]);
    return float(256 * sums[0] + sums[1]);
}

template <int V>
TERDIT_INLINE void add_values(const QuantisedPlace &place, const uint8_t *tile, int64_t keys,
                              int64_t d, const int32_t *plane_sums, const float *keep) {
    for (int64_t half = 0; half < 2; half++)  // three rows of two planes at a time
        dot_block<kBlockRows, V>(
            place.planes + half * kBlockRows * kKeyBlock, kKeyBlock, tile, (keys + 3) / 4,
            [&](int r, int) TERDIT_INLINE_LAMBDA {
                return splat_int(-kOffset * plane_sums[half * kBlockRows + r]);
            },
            [&](vi(&totals)[kBlockRows][V]) TERDIT_INLINE_LAMBDA {
#pragma GCC unroll 8
                for (int r = 0; r < kBlockRows; r += 2)
#pragma GCC unroll 8
                    for (int v = 0; v < V; v++) {
                        const int64_t row = half * 3 + r / 2;
                        float *to = place.out + row * place.padded + d + v * kLanes;
                        const vf sum = to_float(joined<2>(totals[r][v], totals[r + 1][v]));
                        store(to, keep ? fma(load(to), splat(keep[row]), sum) : sum);
                    }
            });
}

void attend_int8(const Attention *job, const AttentionRows &rows_of, void *scratch) {
    const QuantisedPlace place = quantised_place(job, scratch);
    const int64_t tokens = job->tokens, head_dim = job->head_dim;
    const float poison = spread_keys(job, rows_of.k, rows_of.kv_stride, place) +
                         spread_values(job, rows_of.v, rows_of.kv_stride, place);
    const float scale = kLogOfE / __builtin_sqrtf(float(head_dim));
    for (int64_t t = rows_of.first; t < rows_of.end; t += kBlockRows) {
        const int64_t rows = rows_of.end - t < kBlockRows ? rows_of.end - t : kBlockRows;
        float most[kBlockRows], total[kBlockRows], keep[kBlockRows], scales[kBlockRows];
        int32_t starts[kBlockRows], plane_sums[kPlaneRows];
        for (int64_t r = 0; r < kBlockRows; r++) {
            // Rows beyond the last repeat it: the dot products always take six.
            const float *q = rows_of.q + (r < rows ? t + r : t + rows - 1) * rows_of.q_stride;
            int32_t sum;
            if (r < rows) fetch_piece(rows_of.q, rows_of.q_stride, t + r, rows_of.end, head_dim);
            scales[r] = scale * quantise_to(q, head_dim, place.padded, place.q + r * place.padded,
                                            &sum);
            starts[r] = -kOffset * sum;
            most[r] = -__builtin_inff();
            total[r] = 0;
        }
        for (int64_t first = 0; first < tokens; first += kKeyBlock) {
            const int64_t keys = tokens - first < kKeyBlock ? tokens - first : kKeyBlock;
            quantised_scores(place, first, keys, starts, scales);
            for (int64_t r = 0; r < kBlockRows; r++) {
                const float now = max_score(place.scores + r * kKeyBlock, keys, most[r]);
                keep[r] = first ? exp2_coarse(max(splat(-100.0f), splat(most[r] - now)))[0] : 0.0f;
                const float sum = quantised_weights(place, r, keys, now, plane_sums + 2 * r);
                total[r] = total[r] * keep[r] + sum;
                most[r] = now;
            }
            for (int64_t d = 0; d < head_dim; d += kDotColumns) {
                const uint8_t *tile = place.values +
                                      (d / kPanel * place.token_vectors + first / 4) * kTileRow +
                                      d % kPanel * 4;
                const float *kept = first ? keep : nullptr;
                const int64_t vectors = (head_dim - d + kLanes - 1) / kLanes;
                if (vectors >= kDotVectors)
                    add_values<kDotVectors>(place, tile, keys, d, plane_sums, kept);
                else if (vectors == 3)
                    add_values<kDotVectors < 3 ? 1 : 3>(place, tile, keys, d, plane_sums, kept);
                else if (vectors == 2)
                    add_values<kDotVectors < 2 ? 1 : 2>(place, tile, keys, d, plane_sums, kept);
                else
                    add_values<1>(place, tile, keys, d, plane_sums, kept);
            }
        }
        for (int64_t r = 0; r < rows; r++) {
            float *row = place.out + r * place.padded;
            const float inverse = 1.0f / total[r] + scales[r] * 0.0f + poison;
            for (int64_t d = 0; d < head_dim; d += kLanes)
                store(row + d, load(row + d) * load(place.value_steps + d) * inverse);
            memcpy(rows_of.out + (t + r) * rows_of.q_stride, row, size_t(head_dim) * 4);
        }
    }
}

}  // namespace

#endif
