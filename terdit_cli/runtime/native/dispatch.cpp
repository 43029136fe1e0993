// The choice of an instruction set. Compiled for the oldest CPU, so that the query cannot fault;
// the queried features include the operating system's part (saved registers).
#include "dispatch.h"

#include <atomic>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace {

struct Isa {
    const char *name;
    const Kernels *kernels;
    bool (*runs)();
    bool (*preferred)();  // "auto" takes the first that runs and is preferred
};

bool always() { return true; }

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

// CPUID leaf 7, subleaf 1, register eax: bit 4 is AVX-VNNI, bit 5 AVX512-BF16. Older compilers
// do not know these names.
bool has_late_feature(int bit) {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> bit & 1);
}

bool has_avxvnni() { return has_avx2() && has_late_feature(4); }

bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni") && has_avx2();
}

bool has_avx512bf16() { return has_avx512() && has_late_feature(5); }

bool is_amd() { return __builtin_cpu_is("amd"); }
#endif

#if defined(__aarch64__)
bool has_dotprod() {
#if defined(__linux__)
    return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
    return true;  // every Apple CPU since the A13
#endif
}
#endif

const Isa kIsas[] = {
#ifdef TERDIT_HAVE_AVX512BF16
    {"avx512bf16", &terdit_kernels_avx512bf16, has_avx512bf16, is_amd},
#endif
#ifdef TERDIT_HAVE_AVX512
    {"avx512", &terdit_kernels_avx512, has_avx512, always},
#endif
#ifdef TERDIT_HAVE_AVXVNNI
    {"avxvnni", &terdit_kernels_avxvnni, has_avxvnni, always},
#endif
#ifdef TERDIT_HAVE_AVX2
    {"avx2", &terdit_kernels_avx2, has_avx2, always},
#endif
#ifdef TERDIT_HAVE_NEON
    {"neon", &terdit_kernels_neon, has_dotprod, always},
#endif
    {"generic", &terdit_kernels_generic, always, always},
};

const Kernels *best() {
    for (const Isa &isa : kIsas)
        if (isa.runs() && isa.preferred()) return isa.kernels;
    return &terdit_kernels_generic;
}

std::atomic<const Kernels *> active{nullptr};

void append(char *text, const char *name) {
    if (text[0]) strcat(text, " ");
    strcat(text, name);
}

}  // namespace

const Kernels *active_kernels() {
    const Kernels *kernels = active.load();
    if (!kernels) active.store(kernels = best());
    return kernels;
}

int32_t terdit_abi(void) { return TERDIT_ABI; }

const char *terdit_version(void) { return TERDIT_VERSION; }

const char *terdit_isas_usable(void) {
    static char text[128];
    char made[128] = "";
    append(made, best()->name);
    for (const Isa &isa : kIsas)
        if (isa.runs() && isa.kernels != best()) append(made, isa.name);
    strcpy(text, made);
    return text;
}

const char *terdit_isa(void) { return active_kernels()->name; }

int32_t terdit_set_isa(const char *name) {
    if (strcmp(name, "auto") == 0) {
        active.store(best());
        return 0;
    }
    for (const Isa &isa : kIsas)
        if (strcmp(name, isa.name) == 0) {
            if (!isa.runs()) return 2;
            active.store(isa.kernels);
            return 0;
        }
    return 1;
}
