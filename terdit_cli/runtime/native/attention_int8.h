// The attention of attention.h on the dot products of bytes, for CPUs that have them for any u8:
// close to float32, not equal.
//
//     scores = (q8 . k8) step_q step_k / sqrt(head_dim)     q8, k8, v8: int8, one step per token
//     out    = sum(w16 v8) most_step_v / 32512 / sum(p)     p = exp(score - most)
//     w16    = rint(32512 p step_v / most_step_v)
//
// k8 + 128 is an unsigned operand laid out as the byte tiles of gemm.h, so the scores' accumulators
// start at -128 times the sum of the row of q8. The weights are in 0..32512: two planes of u8, with
// v8 as the signed operand, keep the many small weights of a flat softmax.
// Bound: a block of 256 keys adds at most 256 * 32512 * 127 < 2^30 to a sum.
#ifndef TERDIT_ATTENTION_INT8_H
#define TERDIT_ATTENTION_INT8_H

#include "activations.h"
#include "attention.h"
#include "gemm.h"

namespace {

constexpr float kWeightLimit = 32512.0f;
constexpr float kLogOfE = 1.44269504f;  // log2(e)
constexpr int kOffset = 128;
constexpr int64_t kPlaneRows = 2 * kBlockRows;

struct QuantisedPlace {
    uint8_t *keys;        // [ceil(T / 64)][ceil(head_dim / 4)][256]
    int8_t *values;       // [padded / 64][ceil(T / 4)][256]
    float *key_steps;     // [T padded to 64]
    float *value_shares;  // [T padded to 64]: 32512 step / largest step, 0 beyond T
    float *scores;        // [6][256]
    uint8_t *planes;      // [12][256]: high and low bytes of each row's weights
    float *out;           // [6][padded]
    int64_t padded, padded_tokens, key_vectors, token_vectors, bytes;
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
    place.padded_tokens = rounded_up(job->tokens, kPanel);
    place.key_vectors = (job->head_dim + 3) / 4;
    place.token_vectors = (job->tokens + 3) / 4;
    place.keys = (uint8_t *)take(place.padded_tokens / kPanel * place.key_vectors * kTileRow);
    place.values = (int8_t *)take(place.padded / kPanel * place.token_vectors * kTileRow);
    place.key_steps = (float *)take(place.padded_tokens * 4);
    place.value_shares = (float *)take(place.padded_tokens * 4);
    place.scores = (float *)take(kBlockRows * kKeyBlock * 4);
    place.planes = (uint8_t *)take(kPlaneRows * kKeyBlock);
    place.out = (float *)take(kBlockRows * place.padded * 4);
    place.bytes = p - start;
    return place;
}

// Keys [T][padded] to tiles.
void spread_keys(const int8_t *keys, int64_t tokens, const QuantisedPlace &place) {
    for (int64_t t = 0; t < place.padded_tokens; t++) {
        uint8_t *tile = place.keys + t / kPanel * place.key_vectors * kTileRow + t % kPanel * 4;
        for (int64_t i = 0; i < place.key_vectors; i++, tile += kTileRow) {
            uint32_t four = 0;
            if (t < tokens) memcpy(&four, keys + t * place.padded + 4 * i, 4);
            four ^= 0x80808080u;  // + 128 in each byte
            memcpy(tile, &four, 4);
        }
    }
}

TERDIT_INLINE vu load_bytes(const int8_t *p) {
    vb v;
    memcpy(&v, p, sizeof v);
    return (vu)from_bytes(v) & 0xffu;
}

// Values [T][padded] to tiles; the last group of four tokens is filled up with zeros.
void spread_values(const int8_t *values, int64_t tokens, const QuantisedPlace &place) {
    for (int64_t d = 0; d < place.padded; d += kLanes) {
        int8_t *tile =
            place.values + d / kPanel * place.token_vectors * kTileRow + d % kPanel * 4;
        for (int64_t t = 0; t < tokens; t += 4, tile += kTileRow) {
            const int8_t *row = values + t * place.padded + d;
            vu word = load_bytes(row);
            for (uint32_t i = 1; i < 4 && t + i < tokens; i++)
                word |= load_bytes(row + i * place.padded) << (8 * i);
            memcpy(tile, &word, sizeof word);
        }
    }
}

// The largest of n steps, NaN if one is NaN.
float greatest_step(const float *steps, int64_t n) {
    vf most = {}, poison = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        most = max(load(steps + i), most);
        poison += load(steps + i) * 0.0f;
    }
    float greatest = max_lanes(most), rest = sum_lanes(poison);
    for (; i < n; i++) {
        greatest = steps[i] > greatest ? steps[i] : greatest;
        rest += steps[i] * 0.0f;
    }
    return greatest + rest;
}

// Scores [6][256] of the keys from `first` on times their steps, without the rows' scales.
void quantised_scores(const QuantisedPlace &place, const int8_t *q, int64_t first, int64_t keys,
                      const int32_t *starts) {
    for (int64_t s = 0; s < keys; s += kPanel) {
        const uint8_t *tile = place.keys + (first + s) / kPanel * place.key_vectors * kTileRow;
        for (int column = 0; column < kPanel; column += kDotColumns)
            dot_block<kBlockRows, kDotVectors>(
                q, place.padded, tile + 4 * column, place.key_vectors,
                [&](int r, int) TERDIT_INLINE_LAMBDA { return splat_int(starts[r]); },
                [&](vi(&totals)[kBlockRows][kDotVectors]) TERDIT_INLINE_LAMBDA {
                    const float *steps = place.key_steps + first + s + column;
                    float *to = place.scores + s + column;
#pragma GCC unroll 8
                    for (int r = 0; r < kBlockRows; r++)
#pragma GCC unroll 8
                        for (int v = 0; v < kDotVectors; v++)
                            store(to + r * kKeyBlock + v * kLanes,
                                  to_float(totals[r][v]) * load(steps + v * kLanes));
                });
    }
}

// The planes of row r's weights, times the shares of the values; returns the sum of the weights
// themselves. `scale` makes the scores logarithms to the base 2.
TERDIT_INLINE float quantised_weights(const QuantisedPlace &place, int64_t r, int64_t first,
                                      int64_t keys, float scale, float most) {
    const float *row = place.scores + r * kKeyBlock;
    const float *shares = place.value_shares + first;
    uint8_t *high = place.planes + 2 * r * kKeyBlock, *low = high + kKeyBlock;
    // Below 2^-16 a weight rounds to 0, so clamping at 2^-100 changes nothing.
    const vf factor = splat(scale), shift = splat(-most * scale), least = splat(-100.0f);
    vf sum = {};
    // 2^23 leaves no bits for a fraction: the low 16 bits of the sum are the rounded weight.
    const vf magic = splat(8388608.0f);
    const auto planes = [&](int64_t s, vf weight) TERDIT_INLINE_LAMBDA {
        sum += weight;
        const vi u = bits(fma(weight, load(shares + s), magic));
        store_bytes((int8_t *)high + s, u >> 8);
        store_bytes((int8_t *)low + s, u);
    };
    int64_t s = 0;
#pragma GCC unroll 2
    for (; s + kLanes <= keys; s += kLanes)
        planes(s, exp2_coarse(max(least, fma(load(row + s), factor, shift))));
    if (s < keys)
        planes(s, first_lanes(exp2_coarse(max(least, fma(load(row + s), factor, shift))), keys - s));
    return sum_lanes(sum);
}

template <int V>
TERDIT_INLINE void add_values(const QuantisedPlace &place, const int8_t *tile, int64_t keys,
                              int64_t d, const float *keep) {
    for (int64_t half = 0; half < 2; half++)  // three rows of two planes at a time
        dot_block<kBlockRows, V>(
            place.planes + half * kBlockRows * kKeyBlock, kKeyBlock, tile, (keys + 3) / 4,
            [](int, int) TERDIT_INLINE_LAMBDA { return vi{}; },
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

void attend_int8(const Attention *job, const AttentionRows &rows_of, int64_t task, void *scratch) {
    const QuantisedPlace place = quantised_place(job, scratch);
    const int64_t tokens = job->tokens, head_dim = job->head_dim;
    const int64_t head = task / job->row_chunks;  // of all images
    const int64_t q_at = head * tokens;
    const int64_t kv_at = head / (job->heads / job->kv_heads) * tokens;
    const float *k_steps = job->k_bytes.steps + kv_at, *v_steps = job->v_bytes.steps + kv_at;
    spread_keys(job->k_bytes.bytes + kv_at * place.padded, tokens, place);
    spread_values(job->v_bytes.bytes + kv_at * place.padded, tokens, place);
    const float v_step = greatest_step(v_steps, tokens);
    const float poison = (v_step + greatest_step(k_steps, tokens)) * 0.0f;
    for (int64_t t = 0; t < place.padded_tokens; t++) {
        place.key_steps[t] = t < tokens ? k_steps[t] : 0.0f;
        place.value_shares[t] = t < tokens ? kWeightLimit / v_step * v_steps[t] : 0.0f;
    }
    const float scale = kLogOfE / __builtin_sqrtf(float(head_dim));
    for (int64_t t = rows_of.first; t < rows_of.end; t += kBlockRows) {
        const int64_t rows = rows_of.end - t < kBlockRows ? rows_of.end - t : kBlockRows;
        const int8_t *q = job->q_bytes.bytes + (q_at + t) * place.padded;
        float most[kBlockRows], total[kBlockRows], keep[kBlockRows] = {}, scales[kBlockRows];
        int32_t starts[kBlockRows];
        for (int64_t r = 0; r < kBlockRows; r++) {
            const int64_t row = q_at + t + (r < rows ? r : rows - 1);
            scales[r] = scale * job->q_bytes.steps[row];
            starts[r] = kOffset * job->q_bytes.minus_sums[row];
            most[r] = -__builtin_inff();
            total[r] = 0;
        }
        for (int64_t first = 0; first < tokens; first += kKeyBlock) {
            const int64_t keys = tokens - first < kKeyBlock ? tokens - first : kKeyBlock;
            quantised_scores(place, q, first, keys, starts);
            for (int64_t r = 0; r < rows; r++) {
                const float now = max_score(place.scores + r * kKeyBlock, keys, most[r]);
                keep[r] = first ? exp2_coarse(
                                      max(splat(-100.0f), splat((most[r] - now) * scales[r])))[0]
                                : 0.0f;
                total[r] = total[r] * keep[r] +
                           quantised_weights(place, r, first, keys, scales[r], now);
                most[r] = now;
            }
            for (int64_t d = 0; d < head_dim; d += kDotColumns) {
                const int8_t *tile = place.values +
                                     (d / kPanel * place.token_vectors + first / 4) * kTileRow +
                                     d % kPanel * 4;
                const float *kept = first ? keep : nullptr;
                const int64_t vectors = (head_dim - d + kLanes - 1) / kLanes;
                if (vectors >= kDotVectors)
                    add_values<kDotVectors>(place, tile, keys, d, kept);
                else if (vectors == 3)
                    add_values<kDotVectors < 3 ? 1 : 3>(place, tile, keys, d, kept);
                else if (vectors == 2)
                    add_values<kDotVectors < 2 ? 1 : 2>(place, tile, keys, d, kept);
                else
                    add_values<1>(place, tile, keys, d, kept);
            }
        }
        for (int64_t r = 0; r < rows; r++) {
            float *row = place.out + r * place.padded;
            const vf factor =
                splat(v_step / kWeightLimit / total[r] + scales[r] * 0.0f + poison);
            for (int64_t d = 0; d < head_dim; d += kLanes) store(row + d, load(row + d) * factor);
            memcpy(rows_of.out + (t + r) * rows_of.q_stride, row, size_t(head_dim) * 4);
        }
    }
}

}  // namespace

#endif
