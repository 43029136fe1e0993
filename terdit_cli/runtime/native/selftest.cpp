// The exactness table without Python: every kind of activations against plain loops, for sanitizer
// builds and for other CPUs. `selftest [ISA ...]` runs what is named, or all that this CPU can;
// `selftest threads` lets four threads use the library at once.
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#include "ternary.h"

namespace {

int failures = 0;

uint32_t random_bits() {  // xorshift32 (Marsaglia, 2003): the same numbers everywhere
    static thread_local uint32_t state = 2463534242u;
    state ^= state << 13;
    state ^= state >> 17;
    state ^= state << 5;
    return state;
}

float random_float() { return float(int32_t(random_bits())) * 4.6566129e-10f; }  // -1 .. 1

struct Problem {
    int64_t m, n, k;
    int32_t granularity;
    std::vector<float> x, alphas, bias;
    std::vector<int8_t> trits;
    std::vector<uint8_t> codes;

    // `fill` is a trit for all weights, or 2 for random ones.
    Problem(int64_t rows, int64_t outputs, int64_t inputs, int32_t scales, int fill)
        : m(rows), n(outputs), k(inputs), granularity(scales) {
        const int64_t groups = (k + 127) / 128;
        x.resize(size_t(m * k));
        alphas.resize(size_t(scales == TERDIT_TENSOR ? 1 : scales == TERDIT_ROW ? n : n * groups));
        bias.resize(size_t(n));
        trits.resize(size_t(n * k));
        codes.assign(size_t((n + 63) / 64 * ((k + 3) / 4) * 64), 0x55);
        for (float &v : x) v = fill == 2 ? random_float() * 3.0f : (random_bits() & 1 ? 1.0f : -1.0f);
        for (float &v : alphas) v = random_bits() % 8 ? random_float() : 0.0f;
        for (float &v : bias) v = random_float();
        for (int64_t row = 0; row < n; row++)
            for (int64_t i = 0; i < k; i++) {
                const int trit = fill == 2 ? int(random_bits() % 3) - 1 : fill;
                trits[size_t(row * k + i)] = int8_t(trit);
                uint8_t &byte = codes[size_t((row / 64 * ((k + 3) / 4) + i / 4) * 64 +
                                             row % 16 * 4 + i % 4)];
                const int shift = int(row % 64 / 16) * 2;
                byte = uint8_t((byte & ~(3 << shift)) | (trit + 1) << shift);
            }
    }

    terdit_matrix matrix() const {
        return {codes.data(), alphas.data(), bias.data(), n, k, granularity};
    }

    float alpha(int64_t row, int64_t i) const {
        if (granularity == TERDIT_TENSOR) return alphas[0];
        if (granularity == TERDIT_ROW) return alphas[size_t(row)];
        return alphas[size_t(row * ((k + 127) / 128) + i / 128)];
    }

    // A row of x by the integer kinds, as model/ternary.py defines them, operation by operation in
    // float32: the whole numbers, and the step between them.
    float integers(int64_t r, float limit, std::vector<int64_t> &whole) const {
        const float *a = &x[size_t(r * k)];
        float most = 1e-5f;
        for (int64_t i = 0; i < k; i++) most = fmaxf(most, fabsf(a[i]));
        volatile float inverse = 1.0f / most;
        inverse = inverse * limit;
        for (int64_t i = 0; i < k; i++) {
            volatile float scaled = a[i] * inverse;
            whole[size_t(i)] = int64_t(nearbyintf(scaled));
        }
        return most / limit;
    }

    float integer_value(const std::vector<int64_t> &whole, float step, int64_t row) const {
        volatile float y = 0;
        int64_t sum = 0;
        for (int64_t i = 0; i < k; i++) {
            sum += whole[size_t(i)] * trits[size_t(row * k + i)];
            if (granularity == TERDIT_GROUP128 && (i % 128 == 127 || i == k - 1)) {
                volatile float term = float(sum) * alpha(row, i);
                y = y + term;
                sum = 0;
            }
        }
        if (granularity == TERDIT_GROUP128) {
            y = y * step;
        } else {
            y = float(sum) * step;
            y = y * alpha(row, 0);
        }
        return y + bias[size_t(row)];
    }
};

float to_bf16(float v) {
    uint32_t u;
    memcpy(&u, &v, 4);
    u = (u + 0x7fff + ((u >> 16) & 1)) & 0xffff0000u;
    memcpy(&v, &u, 4);
    return v;
}

void fail(const char *what, const Problem &p, int kind, int64_t r, int64_t row, double got,
          double expected) {
    if (failures++ < 10)
        printf("%s %s: kind %d M %d N %d K %d scales %d at [%d, %d]: got %.9g, expected %.9g\n",
               terdit_isa(), what, kind, int(p.m), int(p.n), int(p.k), p.granularity, int(r),
               int(row), got, expected);
}

void check(const Problem &p, int threads) {
    const terdit_matrix matrix = p.matrix();
    std::vector<float> y(size_t(p.m * p.n));
    std::vector<int64_t> whole(size_t(p.k));
    std::vector<double> values(size_t(p.k));
    for (int kind = TERDIT_FP32; kind <= TERDIT_INT8; kind++) {
        for (float &v : y) v = -77.0f;
        if (terdit_linear(&matrix, p.x.data(), p.m, kind, y.data(), threads) != 0) {
            printf("no memory\n");
            exit(2);
        }
        for (int64_t r = 0; r < p.m; r++) {
            float step = 0;
            if (kind >= TERDIT_INT16)
                step = p.integers(r, kind == TERDIT_INT8 ? 127.0f : 32512.0f, whole);
            for (int64_t i = 0; i < p.k; i++) {
                const float v = p.x[size_t(r * p.k + i)];
                values[size_t(i)] = kind == TERDIT_BF16 ? to_bf16(v) : v;
            }
            for (int64_t row = 0; row < p.n; row++) {
                const float got = y[size_t(r * p.n + row)];
                if (kind >= TERDIT_INT16) {
                    const float expected = p.integer_value(whole, step, row);
                    if (got != expected) fail("integers", p, kind, r, row, got, expected);
                    continue;
                }
                double sum = p.bias[size_t(row)], size = fabs(sum);
                for (int64_t i = 0; i < p.k; i++) {
                    const double term =
                        values[size_t(i)] * p.trits[size_t(row * p.k + i)] * p.alpha(row, i);
                    sum += term;
                    size += fabs(term);
                }
                // Any order of summation: at most K + 3 roundings of the terms' total size.
                if (!(fabs(got - sum) <= double(p.k + 3) * ldexp(1, -24) * size + 1e-37))
                    fail("floats", p, kind, r, row, got, sum);
            }
        }
    }
}

void check_not_finite() {
    Problem p(3, 70, 70, TERDIT_TENSOR, 2);
    p.x[70 + 5] = NAN;
    p.x[140 + 69] = -INFINITY;
    const terdit_matrix matrix = p.matrix();
    std::vector<float> y(size_t(p.m * p.n));
    for (int kind : {int(TERDIT_INT16), int(TERDIT_INT8)}) {
        terdit_linear(&matrix, p.x.data(), p.m, kind, y.data(), 1);
        for (int64_t i = 0; i < p.m * p.n; i++)
            if (isnan(y[size_t(i)]) != (i >= p.n)) fail("not finite", p, kind, i / p.n, i % p.n, 0, 0);
    }
}

void check_t5() {
    for (int64_t n : {1, 63, 65})
        for (int64_t k : {1, 4, 7, 130}) {
            Problem p(1, n, k, TERDIT_TENSOR, 2);
            const int powers[5] = {1, 3, 9, 27, 81};
            std::vector<uint8_t> t5(size_t((n * k + 4) / 5), 0), codes(p.codes.size());
            for (int64_t i = 0; i < (n * k + 4) / 5 * 5; i++)
                t5[size_t(i / 5)] += uint8_t((i < n * k ? p.trits[size_t(i)] + 1 : 1) * powers[i % 5]);
            if (terdit_t5_to_t2(t5.data(), n, k, codes.data(), 2) != 0 || codes != p.codes)
                fail("t5", p, 0, 0, 0, 0, 0);
            t5[0] = 243;
            if (terdit_t5_to_t2(t5.data(), n, k, codes.data(), 2) != 1) fail("t5", p, 1, 0, 0, 0, 1);
        }
}

// One small block, with everything on: the outputs must be finite and the same at every call.
void check_blocks(int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t tokens, int kind,
                  int attention) {
    const int64_t dim = heads * head_dim, kv = kv_heads * head_dim, ffn = 2 * dim + 2, batch = 2;
    const int32_t scales = int32_t(dim % 3);
    Problem q(1, dim, dim, scales, 2), k(1, kv, dim, scales, 2), v(1, kv, dim, scales, 2),
        o(1, dim, dim, scales, 2), w1(1, ffn, dim, scales, 2), w3(1, ffn, dim, scales, 2),
        w2(1, dim, ffn, scales, 2), adaln(1, 6 * dim, dim, scales, 2);
    const std::vector<float> ones(size_t(6 * dim), 1.0f), zeros(size_t(dim), 0.0f);
    std::vector<float> cos(size_t(tokens * head_dim / 2), 0.8f), sin(cos.size(), 0.6f);
    terdit_block block = {q.matrix(), k.matrix(), v.matrix(), o.matrix(), w1.matrix(), w2.matrix(),
                          w3.matrix(), adaln.matrix(), ones.data(), ones.data(), ones.data(),
                          ones.data(), zeros.data(), ones.data(), zeros.data()};
    const terdit_model model = {dim, heads, kv_heads, ffn, tokens, dim, 1e-5f, 1e-5f,
                                cos.data(), sin.data(), 1, &block, attention};
    std::vector<float> c(size_t(batch * dim)), modulations(size_t(batch * 6 * dim));
    std::vector<float> start(size_t(batch * tokens * dim)), first;
    for (float &value : c) value = random_float();
    for (float &value : start) value = random_float();
    for (int threads = 1; threads <= 3; threads++) {
        std::vector<float> hidden = start;
        terdit_modulations(&model, c.data(), batch, kind, modulations.data(), threads);
        const float *rows[2] = {modulations.data(), modulations.data() + 6 * dim};
        terdit_blocks(&model, hidden.data(), rows, batch, kind, threads);
        for (float value : hidden)
            if (!isfinite(value)) fail("blocks", q, kind, 0, 0, value, 0);
        if (threads == 1) first = hidden;
        if (hidden != first) fail("blocks by threads", q, kind, 0, 0, threads, 1);
    }
}

void check_everything() {
    for (int64_t m : {1, 2, 3, 5, 6, 7, 13, 70})
        for (int64_t n : {1, 15, 64, 65, 100})
            for (int64_t k : {1, 3, 4, 15, 64, 127, 130, 258})
                check(Problem(m, n, k, int32_t(random_bits() % 3), int(random_bits() % 4) - 1),
                      1 + int(random_bits() % 3));
    check(Problem(6, 64, 1030, TERDIT_GROUP128, 2), 2);
    check(Problem(100, 256, 1030, TERDIT_TENSOR, 2), 4);
    check_not_finite();
    check_t5();
    for (int kind = TERDIT_FP32; kind <= TERDIT_INT8; kind++) {
        for (int attention : {int(TERDIT_FP32), int(TERDIT_INT8)}) {
            check_blocks(2, 1, 6, 9, kind, attention);
            check_blocks(4, 2, 48, 70, kind, attention);
            check_blocks(1, 1, 34, 300, kind, attention);
            check_blocks(2, 2, 98, 66, kind, attention);
        }
    }
}

void *use_library(void *) {
    for (int round = 0; round < 6; round++) {
        check(Problem(20, 130, 200, int32_t(round % 3), 2), 1 + round % 4);
        check_blocks(2, 1, 16, 20, TERDIT_INT8, TERDIT_INT8);
    }
    return nullptr;
}

}  // namespace

int main(int argc, char **argv) {
    if (argc == 2 && strcmp(argv[1], "threads") == 0) {
        pthread_t threads[4];
        for (pthread_t &thread : threads) pthread_create(&thread, nullptr, use_library, nullptr);
        for (pthread_t &thread : threads) pthread_join(thread, nullptr);
        printf("four threads: %s\n", failures ? "FAILED" : "ok");
        return failures != 0;
    }
    for (int i = 1; i < argc; i++)
        if (terdit_set_isa(argv[i]) != 0) {
            printf("%s: not one of threads %s\n", argv[i], terdit_isas_usable());
            return 2;
        }
    char usable[128];
    strcpy(usable, terdit_isas_usable());
    for (char *name = strtok(usable, " "); name; name = strtok(nullptr, " ")) {
        bool wanted = argc == 1;
        for (int i = 1; i < argc; i++) wanted |= strcmp(argv[i], name) == 0;
        if (!wanted) continue;
        const int before = failures;
        terdit_set_isa(name);
        check_everything();
        printf("%-10s %s\n", name, failures > before ? "FAILED" : "ok");
    }
    terdit_release();
    return failures != 0;
}
