// softmax(q k^T / sqrt(head_dim)) v of one head, 6 queries at a time with an online softmax
// (Milakov and Gimelshein, arXiv 1805.02867): no T x T matrix.
//
// k is transposed once per head into tiles of 64 keys, v copied to rows of whole vectors; both
// products then use the float32 microkernel of gemm.h.
#ifndef TERDIT_ATTENTION_H
#define TERDIT_ATTENTION_H

#include "gemm.h"
#include "kernels.h"
#include "simd.h"

namespace {

constexpr int64_t kKeyBlock = 256;  // keys whose scores are held at once

int64_t rounded_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

struct AttentionPlace {
    float *keys;    // [ceil(T / 64)][head_dim][64]
    float *values;  // [T][padded head_dim]
    float *scores;  // [6][kKeyBlock]
    float *out;     // [6][padded head_dim]
    int64_t padded, bytes;
};

AttentionPlace attention_place(const Attention *job, void *scratch) {
    AttentionPlace place;
    float *p = static_cast<float *>(scratch);
    place.padded = rounded_up(job->head_dim, kLanes);
    place.keys = p;
    place.values = place.keys + rounded_up(job->tokens, kPanel) * job->head_dim;
    place.scores = place.values + job->tokens * place.padded;
    place.out = place.scores + kBlockRows * kKeyBlock;
    place.bytes = (place.out - p + kBlockRows * place.padded) * int64_t(sizeof(float));
    return place;
}

// rows [4][4] at `from` (rows `from_stride` apart) transposed to `to`.
TERDIT_INLINE void transpose4(const float *from, ptrdiff_t from_stride, float *to,
                              ptrdiff_t to_stride) {
    v4 a, b, c, d;
    memcpy(&a, from, 16);
    memcpy(&b, from + from_stride, 16);
    memcpy(&c, from + 2 * from_stride, 16);
    memcpy(&d, from + 3 * from_stride, 16);
    const v4 ab0 = shuffle2(a, b, 0, 4, 1, 5), ab1 = shuffle2(a, b, 2, 6, 3, 7);
    const v4 cd0 = shuffle2(c, d, 0, 4, 1, 5), cd1 = shuffle2(c, d, 2, 6, 3, 7);
    const v4 out[4] = {shuffle2(ab0, cd0, 0, 1, 4, 5), shuffle2(ab0, cd0, 2, 3, 6, 7),
                       shuffle2(ab1, cd1, 0, 1, 4, 5), shuffle2(ab1, cd1, 2, 3, 6, 7)};
    for (int i = 0; i < 4; i++) memcpy(to + i * to_stride, &out[i], 16);
}

// The columns of a head are in short pieces, one per token, where no hardware prefetch works: so
// this prefetches the piece some tokens ahead.
TERDIT_INLINE void fetch_piece(const float *rows, ptrdiff_t stride, int64_t t, int64_t tokens,
                               int64_t head_dim) {
    constexpr int64_t ahead = 12, floats = 16;
    if (t + ahead >= tokens) return;
    const float *piece = rows + (t + ahead) * stride;
    for (int64_t i = 0; i < head_dim + floats - 1; i += floats) __builtin_prefetch(piece + i);
}

// k [T][head_dim] (rows k_stride apart) to tiles [head_dim][64], zeros beyond T.
void transpose_keys(const float *k, ptrdiff_t k_stride, int64_t tokens, int64_t head_dim,
                    float *tiles) {
    for (int64_t t0 = 0; t0 < tokens; t0 += kPanel, tiles += head_dim * kPanel) {
        const int64_t count = tokens - t0 < kPanel ? tokens - t0 : kPanel;
        if (count < kPanel) memset(tiles, 0, size_t(head_dim * kPanel) * 4);
        int64_t t = 0;
        for (; t + 4 <= count; t += 4) {
            const float *rows = k + (t0 + t) * k_stride;
            for (int i = 0; i < 4; i++) fetch_piece(k, k_stride, t0 + t + i, tokens, head_dim);
            int64_t d = 0;
            for (; d + 4 <= head_dim; d += 4)
                transpose4(rows + d, k_stride, tiles + d * kPanel + t, kPanel);
            for (; d < head_dim; d++)
                for (int i = 0; i < 4; i++) tiles[d * kPanel + t + i] = rows[i * k_stride + d];
        }
        for (; t < count; t++)
            for (int64_t d = 0; d < head_dim; d++)
                tiles[d * kPanel + t] = k[(t0 + t) * k_stride + d];
    }
}

struct ScoreRows {
    const float *q;
    ptrdiff_t q_stride;
    const float *tile;  // [head_dim][64]
    int64_t head_dim;
    float *scores;  // [6][kKeyBlock]
    template <int R>
    void rows() const {
        for (int column = 0; column < kPanel; column += kFmaVectors * kLanes)
            fma_block<R, kFmaVectors>(q, q_stride, tile + column, kPanel, head_dim, false,
                                      scores + column, kKeyBlock);
    }
};

struct ValueRows {
    const float *weights;  // [6][kKeyBlock]
    const float *values;
    int64_t padded, keys;
    bool add;
    float *out;  // [6][padded]
    template <int R>
    void rows() const {
        int64_t d = 0;
        constexpr int step = kFmaVectors * kLanes;
        for (; d + step <= padded; d += step) columns<R, kFmaVectors>(d);
        const int64_t left = (padded - d) / kLanes;
        if (left == 3) columns<R, 3>(d);
        if (left == 2) columns<R, 2>(d);
        if (left == 1) columns<R, 1>(d);
    }
    template <int R, int V>
    TERDIT_INLINE void columns(int64_t d) const {
        fma_block<R, V>(weights, kKeyBlock, values + d, padded, keys, add, out + d, padded);
    }
};

// Start of the rows of a task: its head's columns, from the first token of its image on.
struct AttentionRows {
    const float *q, *k, *v;
    float *out;
    ptrdiff_t q_stride, kv_stride;
    int64_t first, end;  // the queries of this task
};

AttentionRows attention_rows(const Attention *job, int64_t task) {
    const int64_t chunk =
        rounded_up((job->tokens + job->row_chunks - 1) / job->row_chunks, kBlockRows);
    const int64_t head = task / job->row_chunks % job->heads;
    const int64_t token = task / job->row_chunks / job->heads * job->tokens;
    const int64_t kv_head = head / (job->heads / job->kv_heads);
    AttentionRows rows;
    rows.q_stride = job->heads * job->head_dim;
    rows.kv_stride = job->kv_heads * job->head_dim;
    rows.q = job->q + token * rows.q_stride + head * job->head_dim;
    rows.k = job->k + token * rows.kv_stride + kv_head * job->head_dim;
    rows.v = job->v + token * rows.kv_stride + kv_head * job->head_dim;
    rows.out = job->out + token * rows.q_stride + head * job->head_dim;
    rows.first = task % job->row_chunks * chunk;
    rows.end = rows.first + chunk < job->tokens ? rows.first + chunk : job->tokens;
    return rows;
}

// The maximum of `most` and a row's scores. The row is filled up to whole vectors with its first.
TERDIT_INLINE float max_score(float *row, int64_t keys, float most) {
    for (int64_t s = keys; s % kLanes; s++) row[s] = row[0];
    vf highest = load(row);
    for (int64_t s = kLanes; s < keys; s += kLanes) highest = max(load(row + s), highest);
    const float block_most = max_lanes(highest);
    return block_most > most ? block_most : most;
}

void attend_float(const Attention *job, const AttentionRows &rows_of, void *scratch) {
    const AttentionPlace place = attention_place(job, scratch);
    const int64_t tokens = job->tokens, head_dim = job->head_dim, padded = place.padded;
    transpose_keys(rows_of.k, rows_of.kv_stride, tokens, head_dim, place.keys);
    for (int64_t t = 0; t < tokens; t++) {
        fetch_piece(rows_of.v, rows_of.kv_stride, t, tokens, head_dim);
        memcpy(place.values + t * padded, rows_of.v + t * rows_of.kv_stride, size_t(head_dim) * 4);
        memset(place.values + t * padded + head_dim, 0, size_t(padded - head_dim) * 4);
    }
    const float scale = 1.0f / __builtin_sqrtf(float(head_dim));
    for (int64_t t = rows_of.first; t < rows_of.end; t += kBlockRows) {
        const int64_t rows = rows_of.end - t < kBlockRows ? rows_of.end - t : kBlockRows;
        float most[kBlockRows], total[kBlockRows];
        for (int r = 0; r < kBlockRows; r++) most[r] = -__builtin_inff(), total[r] = 0;
        for (int64_t first = 0; first < tokens; first += kKeyBlock) {
            const int64_t keys = tokens - first < kKeyBlock ? tokens - first : kKeyBlock;
            for (int64_t s = 0; s < keys; s += kPanel)
                with_rows(rows, ScoreRows{rows_of.q + t * rows_of.q_stride, rows_of.q_stride,
                                          place.keys + (first + s) * head_dim, head_dim,
                                          place.scores + s});
            for (int64_t r = 0; r < rows; r++) {
                float *row = place.scores + r * kKeyBlock;
                const float now = max_score(row, keys, most[r]);  // before the scale, as scores
                vf sum = {};
                for (int64_t s = 0; s < keys; s += kLanes) {
                    vf weight = exp((load(row + s) - now) * scale);
                    if (s + kLanes > keys) weight = first_lanes(weight, keys - s);
                    sum += weight;
                    store(row + s, weight);
                }
                const float keep = first ? exp(splat((most[r] - now) * scale))[0] : 0.0f;
                total[r] = total[r] * keep + sum_lanes(sum);
                most[r] = now;
                if (first)
                    for (int64_t d = 0; d < padded; d += kLanes)
                        store(place.out + r * padded + d, load(place.out + r * padded + d) * keep);
            }
            with_rows(rows, ValueRows{place.scores, place.values + first * padded, padded, keys,
                                      first > 0, place.out});
        }
        for (int64_t r = 0; r < rows; r++) {
            float *row = place.out + r * padded;
            for (int64_t d = 0; d < padded; d += kLanes) store(row + d, load(row + d) / total[r]);
            memcpy(rows_of.out + (t + r) * rows_of.q_stride, row, size_t(head_dim) * 4);
        }
    }
}

}  // namespace

#endif
