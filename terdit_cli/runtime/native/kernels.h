// The interface of one instruction set to the rest of the library: a table of functions on raw
// pointers, each doing one task of a job. dispatch.cpp chooses the table, forward.cpp runs the
// tasks on the pool. Included by every file; contains no code.
//
// Letters: M rows of activations, K inputs, N outputs, D width, T tokens, B images.
#ifndef TERDIT_KERNELS_H
#define TERDIT_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "ternary.h"

constexpr int kPanel = 64;       // output columns of a panel of codes
constexpr int kGroup = 128;      // inputs that share a scale (TERDIT_GROUP128)
constexpr int kBlockRows = 6;    // rows of activations that a microkernel handles at once

// Activations as the microkernels read them, row after row.
//   int8:  bytes [M][stride], int16: bytes [2M][stride], the high plane of a row, then its low
//   plane: u = 256 high + low. Bytes from K up to a multiple of 4 are 0.
//   fp32, bf16: floats [M][stride]. bf16 on CPUs that multiply it: halves [M][stride].
struct Activations {
    int32_t kind;         // enum terdit_activations
    bool halves_in_use;   // bf16 is stored as halves
    bool grouped;         // sums are per group of 128
    int64_t m, k;
    int64_t stride;       // elements between rows; bytes and halves are padded with zeros to it
    int8_t *bytes;
    const float *floats;
    uint16_t *halves;
    float *steps;         // [M]; NaN for a row that holds a NaN or an infinity
    int32_t *minus_sums;  // [M * planes][groups]: minus the sum of u, for the codes' +1
};

// The sources of rows of activations.
enum Source {
    kPlain,      // the rows of x
    kModulated,  // RMSNorm(x) * weight * (1 + scale) + shift (adaLN)
    kSilu        // silu(x)
};

struct Prepare {
    int32_t source;  // enum Source
    const float *x;  // [M][K]
    const float *norm_weight;
    float eps;
    const float *const *modulations;  // per image: shift at +shift_at, scale at +scale_at
    int64_t shift_at, scale_at, tokens;
    float *floats;  // destination of fp32 and bf16 rows; unused for plain fp32
    Activations to;
};

// What is done with the products.
enum Epilogue {
    kStore,     // out = y
    kGatedAdd,  // out = out + gate * y, gate per image
    kSwiGlu     // out = silu(y) * y2, y2 from the second matrix
};

struct Multiply {
    const terdit_matrix *matrix, *second;
    const Activations *x;
    int32_t epilogue;  // enum Epilogue
    float *out;        // [M][N]
    const float *const *modulations;  // per image: gate at +gate_at
    int64_t gate_at, tokens;
    int64_t row_chunks;  // the number of tasks per panel into which rows are divided
};

// The heads of one of q, k, v in int8: for each [image][head][token] a row of
// ceil(head_dim / 64) * 64 bytes, a step and minus the sum of the bytes; the step of a row that is
// not finite is NaN.
struct HeadBytes {
    int8_t *bytes;
    float *steps;
    int32_t *minus_sums;
};

struct Rotate {
    float *q, *k;    // [M][heads * head_dim], [M][kv_heads * head_dim]
    const float *v;  // [M][kv_heads * head_dim]
    const float *q_weight, *q_bias, *k_weight, *k_bias;  // of the LayerNorm, or NULL
    float eps;
    const float *cos, *sin;  // [T][head_dim / 2]
    int64_t tokens, heads, kv_heads, head_dim;
    bool quantised;  // fills the bytes of the heads
    HeadBytes q_bytes, k_bytes, v_bytes;
};

struct Attention {
    const float *q, *k, *v;  // [B * T][heads * head_dim], twice [B * T][kv_heads * head_dim]
    HeadBytes q_bytes, k_bytes, v_bytes;  // instead of them, if quantised
    float *out;              // [B * T][heads * head_dim]
    int64_t tokens, heads, kv_heads, head_dim;
    int64_t row_chunks;  // the number of tasks into which a head's queries are divided
    bool quantised;      // computed with dot products of bytes
};

struct Kernels {
    const char *name;
    bool multiplies_halves;  // bf16 activations are stored as halves
    bool dots_any_bytes;     // dot products of all u8, not of codes only: quantised attention

    // Row m of activations.
    void (*prepare)(const Prepare *job, int64_t m, void *scratch);
    size_t (*prepare_scratch)(int64_t k);

    // Task i of row_chunks * panels: the panels of the first chunk of rows come first.
    void (*multiply)(const Multiply *job, int64_t task, void *scratch);
    size_t (*multiply_scratch)(const Multiply *job);

    // LayerNorm (if any) and rotary embedding of row m of q and k, in place; the heads' bytes.
    void (*rotate)(const Rotate *job, int64_t m);

    // Task i of B * heads * row_chunks.
    void (*attend)(const Attention *job, int64_t task, void *scratch);
    size_t (*attend_scratch)(const Attention *job);

    // RMSNorm of x [n] in place.
    void (*rms_norm)(float *x, const float *weight, int64_t n, float eps);

    // Runs the dot instruction `rounds` times from registers; returns the operations done.
    double (*peak)(const char *what, int64_t rounds);
};

extern const Kernels terdit_kernels_generic;
extern const Kernels terdit_kernels_avx2;
extern const Kernels terdit_kernels_avxvnni;
extern const Kernels terdit_kernels_avx512;
extern const Kernels terdit_kernels_avx512bf16;
extern const Kernels terdit_kernels_neon;

#endif
