# mypy: allow-untyped-defs
# ruff: noqa: RET505  what follows a return is compiled, unless it is in an else
"""The Triton kernels: products with packed trits, and the row operations between them.

The packed operand ("slices", made by `backend.from_t2` from t2 once at load, also 2 bits per
weight): uint8 [N, 128 S], S = ceil(K / 512). Byte (n, 128 s + i) holds the trits of row n at
k = 512 s + 128 j + i, j = 0..3, as two's complement in bits 2j and 2j+1: 00, 01, 11 = 0, 1, -1.

Why not t2 itself: there a byte holds four rows of W, so a program that reads it once needs four
accumulators, and an unpacked weight is used for a quarter as many columns of x before it is
dropped; and its runs of 4 bytes per row are too short for 16-byte copies. With four k per byte the
tile of bytes goes from global to shared memory to registers in the tensor cores' own layout.

Unpacking is a shift and a mask: the field in the two top bits of a byte is +-64 in int8 and +-2 in
float8_e4m3, in the two top bits of 16 it is +-2 in bfloat16, and of 32 +-2 in float32. The product
is then divided by 64 or 2, exactly.

The product is computed transposed, y.T [N, M] = W x.T: the operand that may come from registers is
the left one. Sums of int8 are exact: 64 * 127 * K < 2^31 for K < 264,208; of int16 (two planes,
high * 256 + low) for K <= 65,000.

W2A16 against float64, with S = sum_k |x_k t_k|, u = 2^-8 (bfloat16): rounding x costs u S; products
x t are exact; a tensor core aligns its terms to the largest and cuts below 24 bits, so each of the
K additions costs at most 2^-22 of the running size: K 2^-22 S; scale and bias 2^-22 of their
size; rounding y to bfloat16 u |y|. So |error| <= |alpha| S (u [if x is float32] + (K + 1) 2^-22)
+ 2^-22 (|alpha| S + |bias|) + u |y| [if y is bfloat16].

Shapes: M rows of x, N out features, K in features, D width, T tokens per image.
"""

import triton
import triton.language as tl

SLICE = 128  # k that one bit field of a run of bytes covers: the group of a scale
# Without a GPU the tests run the kernels in Triton's interpreter, which has no inline
# assembly and whose bfloat16 products are wrong.
INTERPRETED = bool(triton.knobs.runtime.interpret)

_INTERPRETED = tl.constexpr(INTERPRETED)

# The field j of each byte in its top two bits.
_TOP = tl.constexpr(
    (
        "{ .reg .b32 t; shl.b32 t, $IN, 6; and.b32 t, t, 0xC0C0C0C0; ",
        "{ .reg .b32 t; shl.b32 t, $IN, 4; and.b32 t, t, 0xC0C0C0C0; ",
        "{ .reg .b32 t; shl.b32 t, $IN, 2; and.b32 t, t, 0xC0C0C0C0; ",
        "{ .reg .b32 t; and.b32 t, $IN, 0xC0C0C0C0; ",
    )
)


@triton.jit
def _weights(packed, j: tl.constexpr, KIND: tl.constexpr):
    """Return the field j of bytes [BN, BK] as trits times 64 (int8) or 2 (the floats)."""
    if _INTERPRETED:
        top = ((packed << (6 - 2 * j)) & 0xC0).to(tl.int8, bitcast=True)
        if KIND == "int8":
            return top
        elif KIND == "fp8":
            return top.to(tl.float8e4nv, bitcast=True)
        else:
            return top.to(tl.float32) / 32.0
    else:
        START: tl.constexpr = _TOP[j]
        if KIND == "int8" or KIND == "fp8":
            return tl.inline_asm_elementwise(
                START.replace("IN", "1") + "mov.b32 $0, t; }",
                "=r,r",
                [packed],
                dtype=tl.int8 if KIND == "int8" else tl.float8e4nv,
                is_pure=True,
                pack=4,
            )
        elif KIND == "bf16":
            return tl.inline_asm_elementwise(
                START.replace("IN", "2")
                + "prmt.b32 $0, t, 0, 0x1404; prmt.b32 $1, t, 0, 0x3424; }",
                "=r,=r,r",
                [packed],
                dtype=tl.bfloat16,
                is_pure=True,
                pack=4,
            )
        else:
            return tl.inline_asm_elementwise(
                START.replace("IN", "4")
                + "prmt.b32 $0, t, 0, 0x0444; prmt.b32 $1, t, 0, 0x1444; "
                + "prmt.b32 $2, t, 0, 0x2444; prmt.b32 $3, t, 0, 0x3444; }",
                "=r,=r,=r,=r,r",
                [packed],
                dtype=tl.float32,
                is_pure=True,
                pack=4,
            )


@triton.jit
def _product(weights, x, total, KIND: tl.constexpr):
    """Add weights [BN, BK] times x [BK, BM] to the total [BN, BM]."""
    if KIND == "int8":
        return tl.dot(weights, x, total, out_dtype=tl.int32)
    elif KIND == "fp32":
        # Three products of tf32 parts; the weights are exact in one.
        return tl.dot(weights, x, total, input_precision="tf32x3")
    elif _INTERPRETED:
        return tl.dot(weights.to(tl.float32), x.to(tl.float32), total)
    else:
        return tl.dot(weights, x, total)


@triton.jit
def _whole(total, KIND: tl.constexpr, PLANES: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr):
    """Return the sums of trits times x, float32 [BN, BM / PLANES]: the factor 64 or 2 taken out."""
    if PLANES == 2:
        high, low = tl.split(tl.reshape(total >> 6, (BN, BM // 2, 2)))
        return (high * 256 + low).to(tl.float32)
    elif KIND == "int8":
        return (total >> 6).to(tl.float32)
    else:
        return total * 0.5


@triton.jit(do_not_specialize=["M", "tokens"])
def linear_kernel(
    x, packed, alphas, bias, steps, gates, out,
    M, N, K, groups, tokens, stride_x, row_bytes, stride_alpha, stride_gates, stride_out,
    KIND: tl.constexpr, PLANES: tl.constexpr, GROUPED: tl.constexpr, SWIGLU: tl.constexpr,
    HAS_STEPS: tl.constexpr, HAS_BIAS: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute a tile of out [M, N] = epilogue(alpha * (x @ trits.T) * step + bias).

    x [M * PLANES, K] of KIND (planes: rows 2m high, 2m+1 low); packed [N, 128 S], with SWIGLU
    [2N, 128 S]: gate rows, then value rows; alphas [1], [N] or [N, groups], with SWIGLU of 2N;
    steps float32 [M]; bias float32 [N]; gates float32 [M / tokens, N].
    SWIGLU: out = silu(gate) * value. GATED: out += gates * value.
    """
    COLUMNS: tl.constexpr = BM // PLANES
    RUN: tl.constexpr = 128  # SLICE
    tiles = tl.cdiv(N, BN)
    first_n = (tl.program_id(0) % tiles) * BN
    first_m = (tl.program_id(0) // tiles) * COLUMNS
    # Rows beyond the edge repeat the last: read, but never written.
    n = tl.minimum(first_n + tl.arange(0, BN), N - 1)
    rows = tl.minimum(first_m * PLANES + tl.arange(0, BM), M * PLANES - 1)
    k = tl.arange(0, BK)
    packed_at = packed + n[:, None].to(tl.int64) * row_bytes + k[None, :]
    value_at = packed + (n[:, None] + N).to(tl.int64) * row_bytes + k[None, :]
    x_at = x + rows[None, :].to(tl.int64) * stride_x + k[:, None]
    number: tl.constexpr = tl.int32 if KIND == "int8" else tl.float32
    zero: tl.constexpr = 0 if KIND == "int8" else 0.0
    total = tl.zeros((BN, BM), number)
    value_total = tl.zeros((BN, BM), number)
    if GROUPED:
        scaled = tl.zeros((BN, COLUMNS), tl.float32)
        value_scaled = tl.zeros((BN, COLUMNS), tl.float32)
        alpha_at = alphas + n.to(tl.int64) * groups
        value_alpha_at = alphas + (n + N).to(tl.int64) * groups
    STEP: tl.constexpr = RUN if GROUPED else BK
    for start in range(0, row_bytes, STEP):
        base = tl.multiple_of((start // RUN) * 4 * RUN + start % RUN, STEP)
        for j in tl.static_range(4):
            if GROUPED:
                part = tl.zeros((BN, BM), number)
                value_part = tl.zeros((BN, BM), number)
            for piece in tl.static_range(STEP // BK):
                codes = tl.load(packed_at + start + piece * BK)
                if EVEN:
                    here = tl.load(x_at + base + (j * RUN + piece * BK))
                else:
                    first_k = base + (j * RUN + piece * BK)
                    here = tl.load(x_at + first_k, mask=k[:, None] < K - first_k, other=zero)
                if GROUPED:
                    part = _product(_weights(codes, j, KIND), here, part, KIND)
                else:
                    total = _product(_weights(codes, j, KIND), here, total, KIND)
                if SWIGLU:
                    value_codes = tl.load(value_at + start + piece * BK)
                    weights = _weights(value_codes, j, KIND)
                    if GROUPED:
                        value_part = _product(weights, here, value_part, KIND)
                    else:
                        value_total = _product(weights, here, value_total, KIND)
            if GROUPED:
                group = (start // RUN) * 4 + j
                alpha = tl.load(alpha_at + group, mask=group < groups, other=0.0)
                scaled += _whole(part, KIND, PLANES, BN, BM) * alpha[:, None]
                if SWIGLU:
                    alpha = tl.load(value_alpha_at + group, mask=group < groups, other=0.0)
                    value_scaled += _whole(value_part, KIND, PLANES, BN, BM) * alpha[:, None]
    m = first_m + tl.arange(0, COLUMNS)
    written = tl.minimum(m, M - 1)
    # The order of the reference: sum * step * alpha + bias, groups' alphas before the step.
    y = scaled if GROUPED else _whole(total, KIND, PLANES, BN, BM)
    if HAS_STEPS:
        step = tl.load(steps + written)[None, :]
        y *= step
    if not GROUPED:
        y *= tl.load(alphas + n * stride_alpha)[:, None]
    if SWIGLU:
        value = value_scaled if GROUPED else _whole(value_total, KIND, PLANES, BN, BM)
        if HAS_STEPS:
            value *= step
        if not GROUPED:
            value *= tl.load(alphas + (N + n) * stride_alpha)[:, None]
        y = y / (1.0 + tl.exp(-y)) * value
    if HAS_BIAS:
        y += tl.load(bias + n)[:, None]
    y = tl.trans(y)
    m = first_m + tl.arange(0, COLUMNS)
    n = first_n + tl.arange(0, BN)
    inside = (m < M)[:, None] & (n < N)[None, :]
    out_at = out + m[:, None].to(tl.int64) * stride_out + n[None, :]
    if GATED:
        image = m // tokens
        gate = tl.load(
            gates + image[:, None].to(tl.int64) * stride_gates + n[None, :], mask=inside, other=0.0
        )
        y = tl.load(out_at, mask=inside, other=0.0).to(tl.float32) + gate * y
    tl.store(out_at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def rows_kernel(
    x, weight, shift, scale, out, steps,
    D, tokens, stride_x, stride_weight, stride_modulation, stride_out, period, eps,
    NORM: tl.constexpr, MODULATE: tl.constexpr, KIND: tl.constexpr, LIMIT: tl.constexpr,
    FLOOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Normalise, modulate and quantise one row of x [M, D].

    NORM: "none", "rms" (times weight [period, D], row r's is r % period), "layer" (no weight).
    MODULATE: times 1 + scale plus shift, both [M / tokens, D]. KIND "float": out [M, D] of its
    own dtype; "int8", "fp8": and steps [M]; "int16": out int8 [2M, D], high and low planes.
    A row that holds a NaN or an infinity gets a step of NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < D
    value = tl.load(x + row * stride_x + d, mask=inside, other=0.0).to(tl.float32)
    if NORM == "rms":
        value = value * tl.rsqrt(tl.sum(value * value, axis=0) / D + eps)
        value *= tl.load(weight + (row % period) * stride_weight + d, mask=inside, other=0.0)
    elif NORM == "layer":
        value = tl.where(inside, value - tl.sum(value, axis=0) / D, 0.0)
        value = value * tl.rsqrt(tl.sum(value * value, axis=0) / D + eps)
    if MODULATE:
        at = (row // tokens) * stride_modulation + d
        value = value * (1.0 + tl.load(scale + at, mask=inside, other=0.0))
        value += tl.load(shift + at, mask=inside, other=0.0)
    if KIND == "float":
        tl.store(out + row * stride_out + d, value.to(out.dtype.element_ty), mask=inside)
    else:
        size = tl.abs(value)
        bad = tl.max(tl.where(size < float("inf"), 0, 1), axis=0)  # of a NaN too
        largest = tl.max(tl.where(size < float("inf"), size, 0.0), axis=0)
        largest = tl.where(bad > 0, float("nan"), tl.where(largest > FLOOR, largest, FLOOR))
        u = value * (tl.div_rn(1.0, largest) * LIMIT)
        u = tl.where(bad > 0, 0.0, u)
        tl.store(steps + row, tl.div_rn(largest, LIMIT))
        if KIND == "fp8":
            tl.store(out + row * stride_out + d, u.to(out.dtype.element_ty), mask=inside)
        else:
            # Half to even: above 2^23 a float32 has no fraction. Must not be fused with the
            # product.
            u = ((u + 12582912.0) - 12582912.0).to(tl.int32)
            if KIND == "int8":
                tl.store(out + row * stride_out + d, u.to(tl.int8), mask=inside)
            else:
                high = (u + 128) >> 8
                low = u - high * 256
                tl.store(out + 2 * row * stride_out + d, high.to(tl.int8), mask=inside)
                tl.store(out + (2 * row + 1) * stride_out + d, low.to(tl.int8), mask=inside)


@triton.jit
def rotary_kernel(
    heads, cosines, sines, q_weight, q_bias, k_weight, k_bias,
    tokens, stride, q_width, k_width, half, eps,
    HAS_NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Normalise (LayerNorm over all heads) and rotate q and k in place: heads [M, q | k | v].

    cosines, sines float32 [T, half], half a head's width: the pair (2i, 2i+1) of a head turns by
    the angle of its token.
    """
    row = tl.program_id(0).to(tl.int64)
    is_k = tl.program_id(1)
    width = tl.where(is_k == 1, k_width, q_width)
    pair = tl.arange(0, BLOCK // 2)
    d = 2 * pair[:, None] + tl.arange(0, 2)[None, :]
    inside = d < width
    at = heads + row * stride + is_k * q_width + d
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if HAS_NORM:
        value = tl.where(inside, value - tl.sum(tl.sum(value, axis=1), axis=0) / width, 0.0)
        value *= tl.rsqrt(tl.sum(tl.sum(value * value, axis=1), axis=0) / width + eps)
        if is_k == 1:
            weight = tl.load(k_weight + d, mask=inside, other=0.0)
            bias = tl.load(k_bias + d, mask=inside, other=0.0)
        else:
            weight = tl.load(q_weight + d, mask=inside, other=0.0)
            bias = tl.load(q_bias + d, mask=inside, other=0.0)
        value = value * weight + bias
        # The dtype to which the composable network rounds q and k between norm and rotation.
        value = value.to(heads.dtype.element_ty).to(tl.float32)
    even, odd = tl.split(value)
    angle = (row % tokens) * half + pair % half
    cosine = tl.load(cosines + angle, mask=2 * pair < width, other=0.0)
    sine = tl.load(sines + angle, mask=2 * pair < width, other=0.0)
    turned = tl.join(even * cosine - odd * sine, even * sine + odd * cosine)
    tl.store(at, turned.to(heads.dtype.element_ty), mask=inside)
