// Activations times packed ternary matrices: panels of 64 columns, blocks of up to 6 rows.
//
// A panel's codes are expanded into a tile that stays in the L2 cache for all rows: bytes
// for the integer kinds, float32 or bfloat16 for the others. With codes = trits + 1 as the
// unsigned operand there are no zero points: sum(u * trit) = sum(u * code) - sum(u), so the
// accumulators simply start at minus the row's sum.
//
// Bounds: |u| <= 32512 and |trit| <= 1, so a sum is below 2^31 for K <= 66,000. The planes'
// accumulators may wrap around; arithmetic modulo 2^32 still gives the true sum.
#ifndef TERDIT_GEMM_H
#define TERDIT_GEMM_H

#include "kernels.h"
#include "simd.h"

// From the isa_*.cpp file:
//   constexpr int kDotColumns;   columns that dot_block handles at once, a divisor of 64
//   dot_block<R, V>(bytes, stride, tile, vectors, start, finish): the products of R rows with
//     `vectors` 4-k vectors of the byte tile [vectors][256]; start(r, v) gives the accumulators'
//     first values, finish(totals [R][V]) takes the last ones; V vectors of columns, at most
//     kDotColumns / kLanes
//   constexpr bool kDotsAnyBytes;  dot_block takes tiles of any u8, not of codes 0..2 only, and
//     u8 rows with s8 tiles as well
//   constexpr int kFmaVectors;   vectors of columns that fma_block handles at once
//   fma(a, b, c)
// and, where TERDIT_HALVES is defined, spread_halves(codes, vectors, tile) and
// halves_block<R>(halves, stride, tile, pairs, sums), which adds to sums [R][64].

namespace {

// Tile rows: k / 4 for bytes, k for floats, k / 2 for halves; 256 bytes each.
constexpr int kTileRow = 256;
// Inputs that a float tile covers at once, so that it fits in half of a small L2 (256 KiB).
constexpr int64_t kFloatSpan = 512;
// Vectors of codes that a byte tile covers at once for a single block of rows: fits in L1.
constexpr int64_t kSmallSpan = 64;

// Codes [vectors][64] to bytes [vectors][4 groups of 16 columns][16 columns][4 k].
void spread_bytes(const uint8_t *codes, int64_t vectors, uint8_t *tile) {
    for (int64_t i = 0; i < vectors; i++, codes += 64, tile += kTileRow)
        for (int part = 0; part < 64; part += 4 * kLanes) {
            vu v;
            memcpy(&v, codes + part, sizeof v);
            for (int group = 0; group < 4; group++) {
                const vu code = (v >> (2 * group)) & 0x03030303u;
                memcpy(tile + 64 * group + part, &code, sizeof code);
            }
        }
}

// Codes [vectors][64] to float32 trits [4 * vectors][64 columns], times the scales of their groups
// [groups][64] if there are any. The products are exact: +-alpha or 0.
void spread_floats(const uint8_t *codes, int64_t vectors, const float *group_alphas, float *tile) {
    for (int64_t i = 0; i < vectors; i++, codes += 64, tile += 4 * kPanel)
        for (int part = 0; part < 64; part += 4 * kLanes) {
            vu v;
            memcpy(&v, codes + part, sizeof v);
            for (int k = 0; k < 4; k++)
                for (int group = 0; group < 4; group++) {
                    const int column = 16 * group + part / 4;
                    vf trit = to_float((vi)((v >> (8 * k + 2 * group)) & 3u) - 1);
                    if (group_alphas)
                        trit *= load(group_alphas + 4 * i / kGroup * kPanel + column);
                    store(tile + k * kPanel + column, trit);
                }
        }
}

// out [R][V vectors] = a [R][steps] times b [steps][V vectors], added to what out holds if `add`.
// Not inlined: the accumulators need the registers in which a caller's loop keeps constants.
template <int R, int V>
__attribute__((noinline)) void fma_block(const float *a, ptrdiff_t a_stride, const float *b,
                                         ptrdiff_t b_stride, int64_t steps, bool add, float *out,
                                         ptrdiff_t out_stride) {
    vf sums[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++)
            sums[r][v] = add ? load(out + r * out_stride + v * kLanes) : vf{};
    for (int64_t i = 0; i < steps; i++, b += b_stride) {
        vf columns[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) columns[v] = load(b + v * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const vf value = splat(a[r * a_stride + i]);
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) sums[r][v] = fma(value, columns[v], sums[r][v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) store(out + r * out_stride + v * kLanes, sums[r][v]);
}

// Calls f.template rows<R>() for R = count in 1..6.
template <class F>
TERDIT_INLINE void with_rows(int64_t count, const F &f) {
    switch (count) {
        case 1: f.template rows<1>(); break;
        case 2: f.template rows<2>(); break;
        case 3: f.template rows<3>(); break;
        case 4: f.template rows<4>(); break;
        case 5: f.template rows<5>(); break;
        default: f.template rows<6>(); break;
    }
}

struct FmaRows {
    const float *a;
    ptrdiff_t a_stride;
    const float *tile;
    int64_t steps;
    bool add;
    float *sums;  // [6][64]
    template <int R>
    void rows() const {
        for (int column = 0; column < kPanel; column += kFmaVectors * kLanes)
            fma_block<R, kFmaVectors>(a, a_stride, tile + column, kPanel, steps, add,
                                      sums + column, kPanel);
    }
};

#ifdef TERDIT_HALVES
struct HalvesRows {
    const uint16_t *halves;
    ptrdiff_t stride;
    const uint16_t *tile;
    int64_t pairs;
    float *sums;  // [6][64]
    template <int R>
    void rows() const {
        halves_block<R>(halves, stride, tile, pairs, sums);
    }
};
#endif

// A panel of one matrix with what its epilogue needs, padded to 64 columns.
struct Panel {
    const uint8_t *codes;
    int64_t vectors;             // ceil(K / 4)
    const float *group_alphas;   // [groups][64], or NULL
    alignas(64) float alpha[kPanel];
    alignas(64) float bias[kPanel];
    uint8_t *tile;
};

int64_t groups_of(int64_t k) { return (k + kGroup - 1) / kGroup; }

// `group_alphas` has room for [groups][64].
void open_panel(const terdit_matrix *matrix, int64_t index, float *group_alphas, uint8_t *tile,
                Panel *panel) {
    const int64_t n0 = index * kPanel, left = matrix->rows - n0;
    const int64_t columns = left < kPanel ? left : kPanel;
    panel->vectors = (matrix->columns + 3) / 4;
    panel->codes = matrix->codes + index * panel->vectors * 64;
    panel->tile = tile;
    panel->group_alphas = nullptr;
    for (int n = 0; n < kPanel; n++) {
        const bool real = n < columns;
        panel->bias[n] = matrix->bias && real ? matrix->bias[n0 + n] : 0.0f;
        panel->alpha[n] = 0.0f;
        if (matrix->granularity == TERDIT_TENSOR) panel->alpha[n] = matrix->alphas[0];
        if (matrix->granularity == TERDIT_ROW && real) panel->alpha[n] = matrix->alphas[n0 + n];
    }
    if (matrix->granularity == TERDIT_GROUP128) {
        const int64_t groups = groups_of(matrix->columns);
        for (int64_t g = 0; g < groups; g++)
            for (int n = 0; n < kPanel; n++)
                group_alphas[g * kPanel + n] =
                    n < columns ? matrix->alphas[(n0 + n) * groups + g] : 0.0f;
        panel->group_alphas = group_alphas;
    }
}

TERDIT_INLINE vi load_int(const int32_t *p) {
    vi v;
    memcpy(&v, p, sizeof v);
    return v;
}

constexpr int kDotVectors = kDotColumns / kLanes;

// The true integer sum of real row r from its planes' sums.
template <int kPlanes>
TERDIT_INLINE vi joined(vi high, vi low) {
    return kPlanes == 1 ? high : high * 256 + low;
}

// Rows of bytes times a piece of a tile: sums [R][64] start at minus_sums (rows `groups` apart) or
// continue from their present values.
struct DotRows {
    const int8_t *bytes;
    ptrdiff_t stride;
    const uint8_t *tile;
    int64_t vectors;
    const int32_t *minus_sums;  // or NULL: continue
    int32_t *sums;
    template <int R>
    void rows() const {
        for (int column = 0; column < kPanel; column += kDotColumns)
            dot_block<R, kDotVectors>(
                bytes, stride, tile + 4 * column, vectors,
                [&](int r, int v) TERDIT_INLINE_LAMBDA {
                    return minus_sums ? splat_int(minus_sums[r])
                                      : load_int(sums + r * kPanel + column + v * kLanes);
                },
                [&](vi(&totals)[R][kDotVectors]) TERDIT_INLINE_LAMBDA {
#pragma GCC unroll 8
                    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
                        for (int v = 0; v < kDotVectors; v++)
                            memcpy(sums + r * kPanel + column + v * kLanes, &totals[r][v],
                                   sizeof(vi));
                });
    }
};

// One group of 128 inputs: y [rows][64] = before + (float) sum * alpha.
template <int kPlanes>
struct GroupRows {
    const int8_t *bytes;
    ptrdiff_t stride;
    const uint8_t *tile;
    int64_t vectors;
    const int32_t *minus_sums;
    int64_t groups;  // between the sums of two rows
    const float *alphas;  // [64]
    bool first;
    float *y;
    template <int R>
    void rows() const {
        for (int column = 0; column < kPanel; column += kDotColumns)
            dot_block<R, kDotVectors>(
                bytes, stride, tile + 4 * column, vectors,
                [&](int r, int) TERDIT_INLINE_LAMBDA { return splat_int(minus_sums[r * groups]); },
                [&](vi(&totals)[R][kDotVectors]) TERDIT_INLINE_LAMBDA {
#pragma GCC unroll 8
                    for (int r = 0; r + kPlanes <= R; r += kPlanes)
#pragma GCC unroll 8
                        for (int v = 0; v < kDotVectors; v++) {
                            float *place = y + r / kPlanes * kPanel + column + v * kLanes;
                            const vi sum =
                                joined<kPlanes>(totals[r][v], totals[r + kPlanes - 1][v]);
                            const vf term = to_float(sum) * load(alphas + column + v * kLanes);
                            store(place, first ? term : load(place) + term);
                        }
                });
    }
};

// Group scales: y [rows][64] = the sum over groups of (float) sum * alpha, in ascending order.
template <int kPlanes>
void grouped_block(const Panel &panel, const Activations &x, int64_t m, int64_t rows, bool spread,
                   float *y) {
    constexpr int64_t span = kGroup / 4;
    const int64_t groups = groups_of(x.k);
    const int8_t *bytes = x.bytes + kPlanes * m * x.stride;
    const int32_t *minus_sums = x.minus_sums + kPlanes * m * groups;
    for (int64_t g = 0; g < groups; g++) {
        const int64_t i = g * span;
        const int64_t vectors = i + span < panel.vectors ? span : panel.vectors - i;
        const uint8_t *tile = panel.tile + (spread ? i * kTileRow : 0);
        if (!spread) spread_bytes(panel.codes + i * 64, vectors, panel.tile);
        with_rows(kPlanes * rows,
                  GroupRows<kPlanes>{bytes + 4 * i, x.stride, tile, vectors, minus_sums + g, groups,
                                     panel.group_alphas + g * kPanel, g == 0, y});
    }
}

// One scale per row or tensor: sums [rows * planes][64], the planes still separate.
template <int kPlanes>
void plain_block(const Panel &panel, const Activations &x, int64_t m, int64_t rows, bool spread,
                 int32_t *sums) {
    const int8_t *bytes = x.bytes + kPlanes * m * x.stride;
    const int32_t *minus_sums = x.minus_sums + kPlanes * m;
    const int64_t span = spread ? panel.vectors : kSmallSpan;
    for (int64_t i = 0; i < panel.vectors; i += span) {
        const int64_t vectors = i + span < panel.vectors ? span : panel.vectors - i;
        if (!spread) spread_bytes(panel.codes + i * 64, vectors, panel.tile);
        with_rows(kPlanes * rows, DotRows{bytes + 4 * i, x.stride, panel.tile, vectors,
                                          i == 0 ? minus_sums : nullptr, sums});
    }
}

// y [m1 - m0][64] of float32 rows, all of them at once: the tile covers a span of inputs.
void float_rows(const Panel &panel, const Activations &x, int64_t m0, int64_t m1, float *y) {
    float *tile = reinterpret_cast<float *>(panel.tile);
    for (int64_t k = 0; k < x.k; k += kFloatSpan) {
        const int64_t steps = k + kFloatSpan < x.k ? kFloatSpan : x.k - k;
        const float *alphas =
            panel.group_alphas ? panel.group_alphas + k / kGroup * kPanel : nullptr;
        spread_floats(panel.codes + k / 4 * 64, (steps + 3) / 4, alphas, tile);
        for (int64_t m = m0; m < m1; m += kBlockRows)
            with_rows(m1 - m, FmaRows{x.floats + m * x.stride + k, x.stride, tile, steps, k > 0,
                                      y + (m - m0) * kPanel});
    }
}

#ifdef TERDIT_HALVES
// The same from bfloat16 rows. Group scales cannot be folded into bfloat16 trits, so each group's
// sums are scaled in float32.
void halves_rows(const Panel &panel, const Activations &x, int64_t m0, int64_t m1, float *y) {
    const int64_t span = panel.group_alphas ? kGroup : kFloatSpan;
    uint16_t *tile = reinterpret_cast<uint16_t *>(panel.tile);
    alignas(64) float group[kBlockRows * kPanel];
    memset(y, 0, size_t((m1 - m0) * kPanel) * sizeof(float));
    for (int64_t k = 0; k < x.k; k += span) {
        const int64_t steps = k + span < x.k ? span : x.k - k;
        spread_halves(panel.codes + k / 4 * 64, (steps + 3) / 4, tile);
        for (int64_t m = m0; m < m1; m += kBlockRows) {
            const int64_t rows = m1 - m < kBlockRows ? m1 - m : kBlockRows;
            float *target = y + (m - m0) * kPanel;
            float *sums = panel.group_alphas ? group : target;
            if (panel.group_alphas) memset(group, 0, sizeof group);
            with_rows(rows, HalvesRows{x.halves + m * x.stride + k, x.stride, tile,
                                       (steps + 1) / 2, sums});
            if (!panel.group_alphas) continue;
            const float *alphas = panel.group_alphas + k / kGroup * kPanel;
            for (int64_t i = 0; i < rows * kPanel; i += kLanes)
                store(target + i,
                      load(target + i) + load(group + i) * load(alphas + i % kPanel));
        }
    }
}
#endif

// The input of the epilogue for a block of rows: sums of integers or of floats, [rows][64].
template <int kPlanes>
struct IntegerSums {
    static constexpr bool kMayBeGrouped = false;
    const int32_t *sums;
    TERDIT_INLINE vf at(int64_t r, int n) const {
        const int32_t *high = sums + kPlanes * r * kPanel + n;
        return to_float(joined<kPlanes>(load_int(high), load_int(high + (kPlanes - 1) * kPanel)));
    }
};

struct FloatSums {
    static constexpr bool kMayBeGrouped = true;
    const float *sums;
    TERDIT_INLINE vf at(int64_t r, int n) const { return load(sums + r * kPanel + n); }
};

// (sum * step) * alpha + bias: the order of model/ternary.py. Group scales are already in the sums.
template <class Sums>
TERDIT_INLINE vf scaled(const Panel &panel, const Sums &sums, int64_t r, float step, int n) {
    vf y = sums.at(r, n) * step;
    if (!Sums::kMayBeGrouped || !panel.group_alphas) y = y * load(panel.alpha + n);
    return y + load(panel.bias + n);
}

// Writes rows m .. m + rows - 1 of the columns from n0 on, in the last panel only up to N.
template <int kKind, bool kWhole, class Sums>
TERDIT_INLINE void finish_rows(const Multiply *job, const Panel *panels, int64_t n0, int64_t m,
                               int64_t rows, const float *steps, const Sums &sums,
                               const Sums &sums2) {
    const int64_t left = job->matrix->rows - n0;
    const int columns = kWhole || left > kPanel ? kPanel : static_cast<int>(left);
    for (int64_t r = 0; r < rows; r++) {
        const float step = steps ? steps[r] : 1.0f;
        float *out = job->out + (m + r) * job->matrix->rows + n0;
        const float *gate = kKind == kGatedAdd
                                ? job->modulations[(m + r) / job->tokens] + job->gate_at + n0
                                : nullptr;
#pragma GCC unroll 4
        for (int n = 0; n < columns; n += kLanes) {
            vf y = scaled(panels[0], sums, r, step, n);
            if (kKind == kSwiGlu) y = silu(y) * scaled(panels[1], sums2, r, step, n);
            if (kWhole || n + kLanes <= left) {
                if (kKind == kGatedAdd) y = load(out + n) + load(gate + n) * y;
                store(out + n, y);
            } else {
                const int64_t part = left - n;
                if (kKind == kGatedAdd)
                    y = load_part(out + n, part) + load_part(gate + n, part) * y;
                store_part(out + n, y, part);
            }
        }
    }
}

template <int kKind, class Sums>
TERDIT_INLINE void finish_kind(const Multiply *job, const Panel *panels, int64_t n0, int64_t m,
                               int64_t rows, const float *steps, const Sums &sums,
                               const Sums &sums2) {
    if (job->matrix->rows - n0 >= kPanel)
        finish_rows<kKind, true>(job, panels, n0, m, rows, steps, sums, sums2);
    else
        finish_rows<kKind, false>(job, panels, n0, m, rows, steps, sums, sums2);
}

template <class Sums>
void finish(const Multiply *job, const Panel *panels, int64_t n0, int64_t m, int64_t rows,
            const float *steps, Sums sums, Sums sums2) {
    if (job->epilogue == kSwiGlu)
        finish_kind<kSwiGlu>(job, panels, n0, m, rows, steps, sums, sums2);
    else if (job->epilogue == kGatedAdd)
        finish_kind<kGatedAdd>(job, panels, n0, m, rows, steps, sums, sums2);
    else
        finish_kind<kStore>(job, panels, n0, m, rows, steps, sums, sums2);
}

size_t tile_bytes(const Multiply *job) {
    const bool integers = job->x->kind == TERDIT_INT8 || job->x->kind == TERDIT_INT16;
    const int64_t vectors = (job->matrix->columns + 3) / 4;
    const int64_t rows = !integers ? kFloatSpan : vectors;
    return size_t(rows * kTileRow);
}

size_t group_alpha_bytes(const Multiply *job) {
    return size_t(groups_of(job->matrix->columns) * kPanel) * sizeof(float);
}

int64_t rows_a_chunk(const Multiply *job) {
    const int64_t rows = (job->x->m + job->row_chunks - 1) / job->row_chunks;
    return (rows + kBlockRows - 1) / kBlockRows * kBlockRows;
}

size_t sums_bytes(const Multiply *job) { return size_t(rows_a_chunk(job) * kPanel) * sizeof(float); }

// Two of each: the second matrix of SwiGLU.
size_t multiply_scratch(const Multiply *job) {
    return 2 * (tile_bytes(job) + group_alpha_bytes(job) + sums_bytes(job));
}

template <int kPlanes>
void integer_rows(const Multiply *job, const Panel *panels, int matrices, int64_t n0, int64_t m0,
                  int64_t m1) {
    constexpr int64_t block = kBlockRows / kPlanes;
    const Activations &x = *job->x;
    const bool spread = m1 - m0 > block;  // else each code is used once: expand it in L1
    alignas(64) int32_t sums[2][kBlockRows * kPanel];
    alignas(64) float y[2][kBlockRows * kPanel];
    for (int i = 0; spread && i < matrices; i++)
        spread_bytes(panels[i].codes, panels[i].vectors, panels[i].tile);
    for (int64_t m = m0; m < m1; m += block) {
        const int64_t rows = m1 - m < block ? m1 - m : block;
        for (int i = 0; i < matrices; i++) {
            if (x.grouped)
                grouped_block<kPlanes>(panels[i], x, m, rows, spread, y[i]);
            else
                plain_block<kPlanes>(panels[i], x, m, rows, spread, sums[i]);
        }
        if (x.grouped)
            finish(job, panels, n0, m, rows, x.steps + m, FloatSums{y[0]}, FloatSums{y[1]});
        else
            finish(job, panels, n0, m, rows, x.steps + m, IntegerSums<kPlanes>{sums[0]},
                   IntegerSums<kPlanes>{sums[1]});
    }
}

void multiply(const Multiply *job, int64_t task, void *scratch) {
    const Activations &x = *job->x;
    const int64_t panels = (job->matrix->rows + kPanel - 1) / kPanel;
    const int64_t index = task % panels, chunk = rows_a_chunk(job);
    const int64_t m0 = task / panels * chunk;
    const int64_t m1 = m0 + chunk < x.m ? m0 + chunk : x.m;
    if (m0 >= m1) return;
    const int matrices = job->second ? 2 : 1;
    const terdit_matrix *matrix[2] = {job->matrix, job->second};
    uint8_t *place = static_cast<uint8_t *>(scratch);
    Panel opened[2];
    float *sums[2] = {};
    for (int i = 0; i < matrices; i++) {
        uint8_t *tile = place;
        float *group_alphas = reinterpret_cast<float *>(place + tile_bytes(job));
        sums[i] = reinterpret_cast<float *>(place + tile_bytes(job) + group_alpha_bytes(job));
        place += tile_bytes(job) + group_alpha_bytes(job) + sums_bytes(job);
        open_panel(matrix[i], index, group_alphas, tile, &opened[i]);
    }
    const int64_t n0 = index * kPanel;
    if (x.kind == TERDIT_INT8) return integer_rows<1>(job, opened, matrices, n0, m0, m1);
    if (x.kind == TERDIT_INT16) return integer_rows<2>(job, opened, matrices, n0, m0, m1);
    for (int i = 0; i < matrices; i++) {
#ifdef TERDIT_HALVES
        if (x.halves_in_use) {
            halves_rows(opened[i], x, m0, m1, sums[i]);
            continue;
        }
#endif
        float_rows(opened[i], x, m0, m1, sums[i]);
    }
    finish(job, opened, n0, m0, m1 - m0, nullptr, FloatSums{sums[0]}, FloatSums{sums[1]});
}

}  // namespace

#endif
