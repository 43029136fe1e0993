// AVX-512 with VNNI (Intel Ice Lake and later servers, AMD Zen 4 and later).
#include "isa_avx512.h"

namespace {

const char *const kName = "avx512";

double peak(const char *what, int64_t rounds) {
    return strcmp(what, "int8") == 0 ? peak_int8(rounds) : peak_fp32(rounds);
}

}  // namespace

#define TERDIT_TABLE terdit_kernels_avx512
#include "kernels.inc"
