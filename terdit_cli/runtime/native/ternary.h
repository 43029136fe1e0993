// The C ABI of libterdit: ternary matrices times activations, and the blocks of a DiT made of them.
//
//     y = x @ (alpha * trits).T + bias        x [M, K], trits [N, K], y [M, N]
//
// Plain C types only, so that one library serves every Python and every torch (ctypes). All float
// arrays are row-major float32. No function keeps a pointer after it returns, none throws, and all
// may be called from several threads at once: calls share one pool of threads and take turns.
//
// Packed matrices (the t2 codec of pack/trits.py): code = trit + 1 in {0, 1, 2}; a panel is 64
// output rows; for each 4 consecutive k one 64-byte vector: byte (n % 16) * 4 + k % 4, bits 2j and
// 2j+1 of which hold row group j = (n % 64) / 16. Any address will do; 64-byte alignment is faster.
#ifndef TERDIT_TERNARY_H
#define TERDIT_TERNARY_H

#include <stdint.h>

#define TERDIT_ABI 1
#define TERDIT_MAX_THREADS 256

#if defined(__GNUC__)
#define TERDIT_API __attribute__((visibility("default")))
#else
#define TERDIT_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

// Precision of the activations. Each row has its own step (dynamic, symmetric). A row that
// holds a NaN or an infinity gives NaN in all its outputs in the integer modes.
enum terdit_activations {
    TERDIT_FP32 = 0,   // as they are; sums in float32
    TERDIT_BF16 = 1,   // rounded to bfloat16 (nearest even); sums in float32
    TERDIT_INT16 = 2,  // u = rint(x * (1 / absmax * 32512)), step = absmax / 32512; exact int32 sums
    TERDIT_INT8 = 3    // u = rint(x * (1 / absmax * 127)), step = absmax / 127; exact int32 sums
};

enum terdit_granularity { TERDIT_TENSOR = 0, TERDIT_ROW = 1, TERDIT_GROUP128 = 2 };

typedef struct {
    const uint8_t *codes;  // [ceil(N/64)][ceil(K/4)][64]
    const float *alphas;   // [1], [N] or [N][ceil(K/128)]
    const float *bias;     // [N] or NULL
    int64_t rows;          // N
    int64_t columns;       // K, at most 65,000 (int16 sums fit int32)
    int32_t granularity;   // enum terdit_granularity
} terdit_matrix;

// One block of model/dit.py. Norm weights are [D], [6D] (adaln_norm) or NULL where there is none.
typedef struct {
    terdit_matrix wq, wk, wv, wo, w1, w2, w3, adaln;
    const float *attention_norm, *ffn_norm, *adaln_norm;
    const float *q_norm_weight, *q_norm_bias, *k_norm_weight, *k_norm_bias;
} terdit_block;

typedef struct {
    int64_t dim, heads, kv_heads, ffn_width, tokens, conditioning_width;
    float norm_eps, qk_norm_eps;
    const float *rope_cos, *rope_sin;  // [tokens][head_dim / 2]
    int64_t n_blocks;
    const terdit_block *blocks;
    // TERDIT_FP32, or TERDIT_INT8: attention on int8 queries, keys and values (weights of 16 bits)
    // if the instruction set has dot products of any bytes; close to fp32, not equal.
    int32_t attention;
} terdit_model;

// Versions: the ABI's number, and the text the library was built with (terdit's version).
TERDIT_API int32_t terdit_abi(void);
TERDIT_API const char *terdit_version(void);

// Instruction sets: those built in that this CPU can run (auto's choice first), the one in use.
// terdit_set_isa("auto" or a name) returns 0; 1 for an unknown name; 2 for one the CPU lacks.
TERDIT_API const char *terdit_isas_usable(void);
TERDIT_API const char *terdit_isa(void);
TERDIT_API int32_t terdit_set_isa(const char *name);

// y [M][N] = x [M][K] times the matrix. Returns 0, or 1 when memory ran out.
TERDIT_API int32_t terdit_linear(const terdit_matrix *matrix, const float *x, int64_t m,
                                 int32_t activations, float *y, int32_t threads);

// The modulations of all blocks: out [R][n_blocks][6D] from the conditioning c [R][A].
TERDIT_API int32_t terdit_modulations(const terdit_model *model, const float *c, int64_t rows,
                                      int32_t activations, float *out, int32_t threads);

// All blocks in place: hidden [B][tokens][D]; modulations[b] points at image b's [n_blocks][6D].
TERDIT_API int32_t terdit_blocks(const terdit_model *model, float *hidden,
                                 const float *const *modulations, int64_t batch,
                                 int32_t activations, int32_t threads);

// Codecs: t5 bytes (row by row, 5 codes per byte) -> t2 codes. Returns 0, 1 if a byte is > 242, 2
// when memory ran out.
TERDIT_API int32_t terdit_t5_to_t2(const uint8_t *t5, int64_t n, int64_t k, uint8_t *codes,
                                   int32_t threads);

// Measured peaks: runs the ISA's dot instruction (what = "int8", "bf16" or "fp32") from registers
// on all threads for about `seconds`; returns operations per second (multiply and add count 2).
TERDIT_API double terdit_peak(const char *what, double seconds, int32_t threads);

// Bytes of scratch memory that the library holds (one arena, grown on demand), and releasing it.
TERDIT_API int64_t terdit_arena_bytes(void);
TERDIT_API void terdit_release(void);

#ifdef __cplusplus
}
#endif
#endif
