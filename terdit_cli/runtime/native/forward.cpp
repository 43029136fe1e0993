// The calls of the library: jobs divided into tasks for the pool, with all memory in one arena.
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "dispatch.h"
#include "pool.h"
#include "ternary.h"

namespace {

constexpr size_t kAlign = 64;
constexpr size_t kHugePage = size_t(2) << 20;
constexpr int64_t kRowsATask = 8;

size_t aligned(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }
int64_t rounded_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// One piece of memory for everything a call needs; kept for the next call, grown when too small.
// Its users hold the pool. A plan is laid out twice: first from address 0, to find its size.
struct Arena {
    char *base = nullptr;
    size_t capacity = 0;

    bool reserve(size_t bytes) {
        if (bytes <= capacity) return true;
        release();
        bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
        void *memory = nullptr;
        if (posix_memalign(&memory, kHugePage, bytes) != 0) return false;
#ifdef MADV_HUGEPAGE
        madvise(memory, bytes, MADV_HUGEPAGE);
#endif
        base = static_cast<char *>(memory);
        capacity = bytes;
        return true;
    }

    void release() {
        free(base);
        base = nullptr;
        capacity = 0;
    }
};

Arena arena;

// Hands out memory from an address on; without an address it only counts.
struct Layout {
    char *base;
    size_t used;

    template <class T>
    T *take(int64_t count) {
        T *place = base ? reinterpret_cast<T *>(base + used) : nullptr;
        used += aligned(size_t(count) * sizeof(T));
        return place;
    }
};

// A call of the library, which holds the pool from start to end.
struct Call {
    const Kernels *kernels;
    int threads;

    explicit Call(int32_t wanted) : kernels(active_kernels()), threads(wanted < 1 ? 1 : wanted) {
        if (threads > TERDIT_MAX_THREADS) threads = TERDIT_MAX_THREADS;
        pool_enter(threads);
    }
    ~Call() { pool_leave(); }
};

// Runs f(task, thread) for each task.
template <class F>
void parallel(int64_t tasks, const F &f) {
    pool_run(
        tasks,
        [](void *context, int64_t task, int thread) {
            (*static_cast<const F *>(context))(task, thread);
        },
        const_cast<F *>(&f));
}

// Memory per thread: the largest that any job of a call needs.
struct Scratch {
    size_t bytes = 0;
    char *base = nullptr;

    void need(size_t job) { bytes = aligned(job) > bytes ? aligned(job) : bytes; }
    void place(Layout *layout, int threads) { base = layout->take<char>(int64_t(bytes) * threads); }
    void *of(int thread) const { return base + size_t(thread) * bytes; }
};

Activations take_activations(Layout *layout, const Kernels *kernels, int32_t kind, bool grouped,
                             int64_t m, int64_t k) {
    Activations x = {};
    x.kind = kind;
    x.halves_in_use = kind == TERDIT_BF16 && kernels->multiplies_halves;
    x.grouped = grouped;
    x.m = m;
    x.k = k;
    if (kind == TERDIT_INT8 || kind == TERDIT_INT16) {
        const int64_t planes = kind == TERDIT_INT16 ? 2 : 1;
        x.stride = rounded_up(k, 64);
        x.bytes = layout->take<int8_t>(planes * m * x.stride);
        x.steps = layout->take<float>(m);
        x.minus_sums = layout->take<int32_t>(planes * m * (grouped ? rounded_up(k, kGroup) / kGroup : 1));
    } else if (x.halves_in_use) {
        x.stride = rounded_up(k, 64);
        x.halves = layout->take<uint16_t>(m * x.stride);
    } else {
        x.stride = k;
    }
    return x;
}

void prepare(const Call &call, const Prepare &job, const Scratch &scratch) {
    const int64_t m = job.to.m;
    if (job.source == kPlain && job.to.kind == TERDIT_FP32) return;  // read in place
    parallel((m + kRowsATask - 1) / kRowsATask, [&](int64_t task, int thread) {
        const int64_t end = (task + 1) * kRowsATask < m ? (task + 1) * kRowsATask : m;
        for (int64_t row = task * kRowsATask; row < end; row++)
            call.kernels->prepare(&job, row, scratch.of(thread));
    });
}

int64_t panels_of(const Multiply &job) { return (job.matrix->rows + kPanel - 1) / kPanel; }

// Divides the rows into chunks, equally many per thread, so that a thread keeps to its rows; into
// more if there are too few panels to keep all threads busy to the end.
void set_chunks(Multiply *jobs, int count, int threads) {
    int64_t panels = 0;
    for (int i = 0; i < count; i++) panels += panels_of(jobs[i]);
    int64_t wanted = (8 * threads + panels - 1) / panels;
    wanted = (wanted + threads - 1) / threads * threads;
    for (int i = 0; i < count; i++) {
        const int64_t possible = most(1, jobs[i].x->m / (8 * kBlockRows));
        jobs[i].row_chunks = wanted < possible ? wanted : possible;
    }
}

void multiply(const Call &call, const Multiply *jobs, int count, const Scratch &scratch) {
    int64_t panels = 0;
    for (int i = 0; i < count; i++) panels += panels_of(jobs[i]);
    parallel(panels * jobs[0].row_chunks, [&](int64_t task, int thread) {
        const int64_t chunk = task / panels;
        int64_t panel = task % panels;
        const Multiply *job = jobs;
        for (; panel >= panels_of(*job); job++) panel -= panels_of(*job);
        call.kernels->multiply(job, chunk * panels_of(*job) + panel, scratch.of(thread));
    });
}

Multiply multiply_job(const terdit_matrix *matrix, const Activations *x, float *out) {
    Multiply job = {};
    job.matrix = matrix;
    job.x = x;
    job.epilogue = kStore;
    job.out = out;
    job.tokens = 1;
    job.row_chunks = 1;
    return job;
}

bool is_grouped(const terdit_matrix &matrix) { return matrix.granularity == TERDIT_GROUP128; }

// All memory that the blocks need, and their jobs.
struct Step {
    const Call &call;
    const terdit_model &model;
    int64_t images, m, dim, kv_width;
    int32_t kind;
    bool quantised = false;  // the attention
    Scratch scratch;
    float *wide;             // [M][max(3 dim, ffn)]: q, k, v, and later the SwiGLU's output
    float *attended, *rows;  // [M][dim]; prepared rows, if they stay float
    float *ffn_rows;         // [M][ffn], likewise
    Activations to_dim, to_ffn;
    HeadBytes q_bytes = {}, k_bytes = {}, v_bytes = {};

    Step(const Call &a_call, const terdit_model &a_model, int64_t batch, int32_t activations)
        : call(a_call), model(a_model), images(batch), m(batch * a_model.tokens),
          dim(a_model.dim), kv_width(a_model.dim / a_model.heads * a_model.kv_heads),
          kind(activations) {}

    void lay_out(Layout *layout) {
        const bool floats = kind == TERDIT_FP32 || kind == TERDIT_BF16;
        const bool grouped = is_grouped(model.blocks[0].wq);
        wide = layout->take<float>(m * most(dim + 2 * kv_width, model.ffn_width));
        quantised = model.attention == TERDIT_INT8 && call.kernels->dots_any_bytes;
        // Attention that reads the bytes of the heads may overwrite q.
        attended = quantised ? wide : layout->take<float>(m * dim);
        rows = floats ? layout->take<float>(m * dim) : nullptr;
        ffn_rows = kind == TERDIT_BF16 ? layout->take<float>(m * model.ffn_width) : nullptr;
        to_dim = take_activations(layout, call.kernels, kind, grouped, m, dim);
        to_ffn = take_activations(layout, call.kernels, kind, grouped, m, model.ffn_width);
        if (quantised) {
            q_bytes = take_heads(layout, model.heads);
            k_bytes = take_heads(layout, model.kv_heads);
            v_bytes = take_heads(layout, model.kv_heads);
        }
        const terdit_block &block = model.blocks[0];
        Multiply widest = multiply_job(&block.w1, &to_dim, wide);
        Multiply deepest = multiply_job(&block.w2, &to_ffn, wide);
        scratch.need(call.kernels->multiply_scratch(&widest));
        scratch.need(call.kernels->multiply_scratch(&deepest));
        scratch.need(call.kernels->prepare_scratch(most(dim, model.ffn_width)));
        const Attention attention = attention_job();
        scratch.need(call.kernels->attend_scratch(&attention));
        scratch.place(layout, call.threads);
    }

    HeadBytes take_heads(Layout *layout, int64_t heads) const {
        HeadBytes place;
        // Blocks of rows may extend beyond the last token.
        place.bytes = layout->take<int8_t>((m * heads + kBlockRows) *
                                           rounded_up(dim / model.heads, kPanel));
        place.steps = layout->take<float>(m * heads);
        place.minus_sums = layout->take<int32_t>(m * heads);
        return place;
    }

    Attention attention_job() const {
        Attention job = {};
        job.q = wide;
        job.k = wide ? wide + m * dim : nullptr;
        job.v = wide ? wide + m * (dim + kv_width) : nullptr;
        job.out = attended;
        job.tokens = model.tokens;
        job.heads = model.heads;
        job.kv_heads = model.kv_heads;
        job.head_dim = dim / model.heads;
        job.quantised = quantised;
        job.q_bytes = q_bytes;
        job.k_bytes = k_bytes;
        job.v_bytes = v_bytes;
        const int64_t wanted = (4 * call.threads + images * model.heads - 1) / (images * model.heads);
        job.row_chunks = wanted < model.tokens / 48 ? wanted : most(1, model.tokens / 48);
        return job;
    }

    Prepare plain_rows(const float *x, Activations *to, float *floats) const {
        Prepare job = {};
        job.source = kPlain;
        job.x = x;
        job.floats = floats;
        to->floats = kind == TERDIT_FP32 ? x : floats;
        job.to = *to;
        return job;
    }

    Prepare modulated_rows(const float *x, const float *norm_weight,
                           const float *const *modulations, int64_t shift_at) {
        Prepare job = plain_rows(x, &to_dim, rows);
        to_dim.floats = rows;
        job.to = to_dim;
        job.source = kModulated;
        job.norm_weight = norm_weight;
        job.eps = model.norm_eps;
        job.modulations = modulations;
        job.shift_at = shift_at;
        job.scale_at = shift_at + dim;
        job.tokens = model.tokens;
        return job;
    }

    void add_gated(const terdit_matrix *matrix, const Activations *x, float *hidden,
                   const float *const *modulations, int64_t gate_at) const {
        Multiply job = multiply_job(matrix, x, hidden);
        job.epilogue = kGatedAdd;
        job.modulations = modulations;
        job.gate_at = gate_at;
        job.tokens = model.tokens;
        set_chunks(&job, 1, call.threads);
        multiply(call, &job, 1, scratch);
    }

    void attention_half(const terdit_block &block, float *hidden, const float *const *modulations,
                        int64_t at) {
        prepare(call, modulated_rows(hidden, block.attention_norm, modulations, at), scratch);
        float *q = wide, *k = q + m * dim, *v = k + m * kv_width;
        Multiply jobs[3] = {multiply_job(&block.wq, &to_dim, q), multiply_job(&block.wk, &to_dim, k),
                            multiply_job(&block.wv, &to_dim, v)};
        set_chunks(jobs, 3, call.threads);
        multiply(call, jobs, 3, scratch);
        const Rotate rotation = {q,
                                 k,
                                 v,
                                 block.q_norm_weight,
                                 block.q_norm_bias,
                                 block.k_norm_weight,
                                 block.k_norm_bias,
                                 model.qk_norm_eps,
                                 model.rope_cos,
                                 model.rope_sin,
                                 model.tokens,
                                 model.heads,
                                 model.kv_heads,
                                 dim / model.heads,
                                 quantised,
                                 q_bytes,
                                 k_bytes,
                                 v_bytes};
        parallel((m + kRowsATask - 1) / kRowsATask, [&](int64_t task, int) {
            const int64_t end = (task + 1) * kRowsATask < m ? (task + 1) * kRowsATask : m;
            for (int64_t row = task * kRowsATask; row < end; row++)
                call.kernels->rotate(&rotation, row);
        });
        const Attention attention = attention_job();
        parallel(images * model.heads * attention.row_chunks, [&](int64_t task, int thread) {
            call.kernels->attend(&attention, task, scratch.of(thread));
        });
        prepare(call, plain_rows(attended, &to_dim, rows), scratch);
        add_gated(&block.wo, &to_dim, hidden, modulations, at + 2 * dim);
    }

    void feed_forward_half(const terdit_block &block, float *hidden,
                           const float *const *modulations, int64_t at) {
        prepare(call, modulated_rows(hidden, block.ffn_norm, modulations, at), scratch);
        Multiply job = multiply_job(&block.w1, &to_dim, wide);
        job.second = &block.w3;
        job.epilogue = kSwiGlu;
        set_chunks(&job, 1, call.threads);
        multiply(call, &job, 1, scratch);
        prepare(call, plain_rows(wide, &to_ffn, ffn_rows), scratch);
        add_gated(&block.w2, &to_ffn, hidden, modulations, at + 2 * dim);
    }
};

double now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return double(time.tv_sec) + 1e-9 * double(time.tv_nsec);
}

}  // namespace

int32_t terdit_linear(const terdit_matrix *matrix, const float *x, int64_t m, int32_t activations,
                      float *y, int32_t threads) {
    if (m == 0) return 0;
    const Call call(threads);
    for (int pass = 0; pass < 2; pass++) {
        Layout layout = {pass ? arena.base : nullptr, 0};
        Prepare rows = {};
        rows.source = kPlain;
        rows.x = x;
        rows.to = take_activations(&layout, call.kernels, activations, is_grouped(*matrix), m,
                                   matrix->columns);
        if (activations == TERDIT_BF16 && !rows.to.halves_in_use)
            rows.floats = layout.take<float>(m * matrix->columns);
        rows.to.floats = activations == TERDIT_FP32 ? x : rows.floats;
        Multiply job = multiply_job(matrix, &rows.to, y);
        set_chunks(&job, 1, call.threads);
        Scratch scratch;
        scratch.need(call.kernels->multiply_scratch(&job));
        scratch.need(call.kernels->prepare_scratch(matrix->columns));
        scratch.place(&layout, call.threads);
        if (pass == 0) {
            if (!arena.reserve(layout.used)) return 1;
            continue;
        }
        prepare(call, rows, scratch);
        multiply(call, &job, 1, scratch);
    }
    return 0;
}

int32_t terdit_modulations(const terdit_model *model, const float *c, int64_t rows,
                           int32_t activations, float *out, int32_t threads) {
    if (rows == 0) return 0;
    const Call call(threads);
    const int64_t width = 6 * model->dim;
    for (int pass = 0; pass < 2; pass++) {
        Layout layout = {pass ? arena.base : nullptr, 0};
        float *made = layout.take<float>(rows * width);
        Prepare silu = {};
        silu.source = kSilu;
        silu.x = c;
        silu.floats = layout.take<float>(rows * model->conditioning_width);
        silu.to = take_activations(&layout, call.kernels, activations,
                                   is_grouped(model->blocks[0].adaln), rows,
                                   model->conditioning_width);
        silu.to.floats = silu.floats;
        Multiply job = multiply_job(&model->blocks[0].adaln, &silu.to, made);
        set_chunks(&job, 1, call.threads);
        Scratch scratch;
        scratch.need(call.kernels->multiply_scratch(&job));
        scratch.need(call.kernels->prepare_scratch(model->conditioning_width));
        scratch.place(&layout, call.threads);
        if (pass == 0) {
            if (!arena.reserve(layout.used)) return 1;
            continue;
        }
        prepare(call, silu, scratch);
        for (int64_t i = 0; i < model->n_blocks; i++) {
            const terdit_block &block = model->blocks[i];
            job.matrix = &block.adaln;
            multiply(call, &job, 1, scratch);
            for (int64_t r = 0; r < rows; r++) {
                float *row = out + (r * model->n_blocks + i) * width;
                memcpy(row, made + r * width, size_t(width) * sizeof(float));
                if (block.adaln_norm)
                    call.kernels->rms_norm(row, block.adaln_norm, width, model->norm_eps);
            }
        }
    }
    return 0;
}

int32_t terdit_blocks(const terdit_model *model, float *hidden, const float *const *modulations,
                      int64_t batch, int32_t activations, int32_t threads) {
    if (batch == 0 || model->n_blocks == 0) return 0;
    const Call call(threads);
    Step step(call, *model, batch, activations);
    Layout size = {nullptr, 0};
    step.lay_out(&size);
    if (!arena.reserve(size.used)) return 1;
    Layout layout = {arena.base, 0};
    step.lay_out(&layout);
    const int64_t width = 6 * model->dim;
    for (int64_t i = 0; i < model->n_blocks; i++) {
        step.attention_half(model->blocks[i], hidden, modulations, i * width);
        step.feed_forward_half(model->blocks[i], hidden, modulations, i * width + 3 * model->dim);
    }
    return 0;
}

int32_t terdit_t5_to_t2(const uint8_t *t5, int64_t n, int64_t k, uint8_t *codes, int32_t threads) {
    constexpr int64_t slack = 8;  // a row starts up to 4 codes into a byte and is copied in eights
    const Call call(threads);
    const int64_t vectors = (k + 3) / 4, used = (n * k + 4) / 5, stride = 4 * vectors + 3 * slack;
    Scratch scratch;
    scratch.need(size_t(kPanel * stride));
    Layout layout = {nullptr, 0};
    scratch.place(&layout, call.threads);
    if (!arena.reserve(layout.used)) return 2;
    layout = {arena.base, 0};
    scratch.place(&layout, call.threads);
    uint64_t digits[256];  // the five codes of a byte, one per byte
    for (int byte = 0; byte < 256; byte++) {
        digits[byte] = 0;
        for (int i = 0, rest = byte; i < 5; i++, rest /= 3)
            digits[byte] |= uint64_t(rest % 3) << (8 * i);
    }
    parallel((n + kPanel - 1) / kPanel, [&](int64_t panel, int thread) {
        uint8_t *rows = static_cast<uint8_t *>(scratch.of(thread));
        memset(rows, 1, size_t(kPanel * stride));  // code 1: weight 0
        const int64_t last = (panel + 1) * kPanel < n ? (panel + 1) * kPanel : n;
        for (int64_t row = panel * kPanel; row < last; row++) {
            const int64_t first = row * k / 5, end = ((row + 1) * k + 4) / 5;
            uint8_t *to = rows + row % kPanel * stride + slack;
            uint8_t *place = to - row * k % 5;
            for (int64_t i = first; i < end; i++, place += 5) memcpy(place, &digits[t5[i]], 8);
            memset(to + k, 1, size_t(4 * vectors - k));
        }
        for (int64_t i = 0; i < vectors; i++)
            for (int64_t place = 0; place < 16; place++) {
                uint32_t word = 0;
                for (int64_t group = 0; group < 4; group++) {
                    uint32_t four;
                    memcpy(&four, rows + (16 * group + place) * stride + slack + 4 * i, 4);
                    word |= four << (2 * group);
                }
                memcpy(codes + (panel * vectors + i) * kPanel + 4 * place, &word, 4);
            }
    });
    int32_t bad = 0;
    for (int64_t i = 0; i < used; i++) bad |= t5[i] > 242;
    return bad;
}

double terdit_peak(const char *what, double seconds, int32_t threads) {
    const Call call(threads);
    int64_t rounds = 1000;
    for (;;) {
        double done[TERDIT_MAX_THREADS] = {};
        const double start = now();
        parallel(call.threads,
                 [&](int64_t task, int) { done[task] = call.kernels->peak(what, rounds); });
        const double taken = now() - start;
        double total = 0;
        for (int i = 0; i < call.threads; i++) total += done[i];
        if (taken >= 0.5 * seconds) return total / taken;
        rounds = int64_t(double(rounds) * fmin(10.0, seconds / fmax(taken, 1e-9)) * 1.1);
    }
}

int64_t terdit_arena_bytes(void) {
    const Call call(1);
    return int64_t(arena.capacity);
}

void terdit_release(void) {
    const Call call(1);
    arena.release();
}
