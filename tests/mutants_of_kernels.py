"""Mistakes in kernels/ for mutants.py to make: file → (name, text, replacement, tests that must notice)."""

FORWARD = "test_kernels.py -k 'test_linear_act and smoke'"
BACKWARD = "test_kernels.py -k 'test_linear_dact and smoke'"
INTEGERS = "test_kernels.py -k 'test_small_integers_are_exact and relu and tiny and {}'"
ODD, TILES = INTEGERS.format("odd"), INTEGERS.format("tiles")
GATED = "test_kernels.py -k 'test_small_integers_are_exact and geglu and {}'"
ROWS = "test_kernels.py -k 'test_every_configuration_row and 16bit-128x128 and tma'"
NO_TMA = "test_kernels.py -k tma_cannot_address"
TF32 = "test_precision.py -k precision_reaches"
REJECTED = "test_kernels.py -k launchers_reject"
AT_ONCE = "test_kernels.py -k 16_bytes_at_once"
COLUMN_SUM = "test_kernels.py -k column_sum"
ROUNDED = "test_precision.py -k rounded_once"
PRECISION = "test_precision.py -k fp32_precision"
GUARD_PAGES = "test_memory.py -k 'test_guard_pages and end'"
FAR = "test_memory.py -k past_two_to_the_31"
JIT = "test_compile_gate.py -k 'what_launches_do and sm_90 and installed'"

STORE = "        mask = (offs_m[:, None] < M) & (offs_n[None, :] < N)\n        tl.store("
PRODUCT = "acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION)"
IN_BF16 = "acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION).to(tl.bfloat16).to(tl.float32)"
TOWARD_ZERO = "(tile.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)"
RELU_SQUARED = '\n        if ACTIVATION == "relu2":\n            act = act * act'
RELU = f"tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL){RELU_SQUARED}"
HALF = "half = Operand((M, {}), (width, 1), {like}.dtype, {like}.device, 0)"
OF_DTYPE = "{0}.to({1}.dtype if USE_TMA else {1}.dtype.element_ty).to(tl.float32)"
# A cache of launches that forgets the shapes of the operands.
SHAPELESS = (
    "def _keep(function, known={}):\n"
    "    def prepared(*args):\n"
    "        key = function, str([arg[1:] if isinstance(arg, tuple) else arg for arg in args])\n"
    "        return known[key] if key in known else known.setdefault(key, function(*args))\n"
    "    return prepared\n"
)

MUTANTS = {
    "kernels/activations.py": [
        ("unknown activation accepted", "if activation not in ACTIVATIONS:", "if False:", REJECTED),
        (
            "erf for tanh",
            'if ACTIVATION == "gelu" or ACTIVATION == "gelu_16bit":\n        cdf, _',
            'if ACTIVATION == "gelu" or ACTIVATION == "gelu_16bit" or ACTIVATION == "gelu_tanh":\n        cdf, _',
            FORWARD,
        ),
        (
            "derivative of tanh gelu without its inner term",
            "tl.fma(z2, 0.134145, 1.0)",
            "tl.fma(z2, 0.044715, 1.0)",
            BACKWARD,
        ),
        (
            "fourth digit of a coefficient of 16-bit gelu",
            "0.7107068705",
            "0.7108068705",
            "test_precision.py -k cheap_gelu",
        ),
        ("derivative of relu2 without its factor", "d = 2.0 * act", "d = act", BACKWARD),
        ("slope of relu at zero", "tl.where(z <= 0.0, 0.0, 1.0)", "tl.where(z < 0.0, 0.0, 1.0)", ODD),
        (
            "NaN hidden by relu",
            f"act = {RELU}\n    return",
            f"act = tl.where(z > 0.0, z, 0.0){RELU_SQUARED}\n    return",
            "test_kernels.py -k nan_is_never_hidden",
        ),
    ],
    "kernels/_tiles.py": [
        (
            "last bias column dropped",
            "vector_ptr + offs_n, mask=offs_n < N",
            "vector_ptr + offs_n, mask=offs_n < N - 1",
            "test_kernels.py -k one_hot",
        ),
        (
            "K tile skipped on the pointer path",
            "for k in range(first_k, K, BLOCK_K):\n            a_tile = tl.load",
            "for k in range(first_k, K - BLOCK_K, BLOCK_K):\n            a_tile = tl.load",
            TILES,
        ),
        (
            "K tile skipped on the TMA path",
            "# Reads past an edge return zero.\n        for k in range(first_k, K, BLOCK_K):",
            "for k in range(first_k, K // BLOCK_K * BLOCK_K, BLOCK_K):",
            ROWS,
        ),
        (
            "K mask off by one",
            "b_tile = tl.load(b_ptrs, mask=offs_k[:, None] < K - k, other=0.0)",
            "b_tile = tl.load(b_ptrs, mask=offs_k[:, None] < K - k - 1, other=0.0)",
            ODD,
        ),
        ("last row not stored", STORE, STORE.replace("< M", "< M - 1"), ODD),
        ("last column not stored", STORE, STORE.replace("< N", "< N - 1"), ODD),
        ("accumulator of the pointer path rounded to bf16", f"{PRODUCT}\n    return", f"{IN_BF16}\n    return", ODD),
        ("accumulator of the TMA path rounded to bf16", f"{PRODUCT}\n    else:", f"{IN_BF16}\n    else:", ROWS),
        (
            "round toward zero at the pointer store",
            "tile.to(dst.dtype.element_ty)",
            f"{TOWARD_ZERO}.to(dst.dtype.element_ty)",
            "test_kernels.py -k 'test_linear_act and odd and bfloat16'",
        ),
        ("round toward zero at the TMA store", "tile.to(dst.dtype)", f"{TOWARD_ZERO}.to(dst.dtype)", ROUNDED),
        (
            "halves of a split epilogue swapped",
            "tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))",
            "tl.reshape(acc, (BLOCK_M, BLOCK_N // 2, 2))",
            ROWS,
        ),
        (
            "last short group of row tiles taken for a full one",
            "tl.minimum(tiles_m - first_m, GROUP_M)",
            "tl.minimum(tiles_m, GROUP_M)",
            "test_memory.py -k more_than_two_to_the_31",
        ),
        ("offsets of 32 bits", "offs_row[:, None].to(tl.int64)", "offs_row[:, None]", FAR),
        (
            "step through K of 32 bits",
            "tl.full((), BLOCK_K, tl.int64)",
            "tl.full((), BLOCK_K, tl.int32)",
            "test_memory.py -k test_a_step",
        ),
        (
            "up's weights read from gate's rows by TMA",
            "b.load([N + tile_n * BLOCK_N, k])",
            "b.load([tile_n * BLOCK_N, k])",
            GATED.format("smoke and table"),
        ),
        (
            "mask of gate and up off by one",
            "mask = offs_k[None, :] < K - k\n",
            "mask = offs_k[None, :] < K - k - 1\n",
            GATED.format("odd"),
        ),
    ],
    "kernels/column_sum.py": [
        (
            "last partial row of a column sum lost",
            "mask=(offs_r[:, None] < R)",
            "mask=(offs_r[:, None] < R - 1)",
            COLUMN_SUM,
        ),
        (
            "partial sums rounded to the result's dtype",
            "out_dtype if partial_rows == 1 else torch.float32",
            "out_dtype",
            COLUMN_SUM,
        ),
    ],
    "kernels/linear_act.py": [
        ("gate and up swapped", "gate_acc, up_acc = gemm", "up_acc, gate_acc = gemm", FORWARD),
        (
            "up's bias taken from gate's",
            "add_row_vector(up_acc, bias_ptr + N,",
            "add_row_vector(up_acc, bias_ptr,",
            FORWARD,
        ),
        (
            "gate of pre_act stored over up",
            "store_tile(gate, gate_acc, row, col, M, N, 2 * N",
            "store_tile(gate, gate_acc, row, col, M, 2 * N, 2 * N",
            GATED.format("odd and tiny"),
        ),
        (
            "up of pre_act stored with the stride of act",
            "store_tile(up, up_acc, row, col, M, N, 2 * N",
            "store_tile(up, up_acc, row, col, M, N, N",
            GATED.format("odd and tiny"),
        ),
        (
            "gate's descriptor as wide as pre_act",
            HALF.format("N", like="x"),
            HALF.format("width", like="x"),
            GUARD_PAGES,
        ),
        (
            "activation of the rounded pre-activation",
            "store_tile(act, activate(part, ACTIVATION)",
            f"store_tile(act, activate({OF_DTYPE.format('part', 'pre_act')}, ACTIVATION)",
            ROUNDED,
        ),
        (
            "gated product of a rounded factor",
            "activate(gate_acc, ACTIVATION) * up_acc",
            OF_DTYPE.format("activate(gate_acc, ACTIVATION)", "act") + " * up_acc",
            ROUNDED,
        ),
        (
            "launch that compiles for each M",
            '@triton.jit(do_not_specialize=["M"])\ndef linear_act',
            "@triton.jit\ndef linear_act",
            JIT,
        ),
    ],
    "kernels/linear_dact.py": [
        ("wrapped rows counted in db1", "tl.where(offs_m[:, None] < M, tile, 0.0)", "tile", BACKWARD),
        (
            "db1 from rounded d_pre",
            "_store_partial_sums(grad, db_partial_ptr, row, col, M, N, N,",
            f"_store_partial_sums({OF_DTYPE.format('grad', 'd_pre')}, db_partial_ptr, row, col, M, N, N,",
            TILES,
        ),
        (
            "last partial sums of db1 missing",
            "partials = tl.cdiv(M, _PARTIAL_ROWS)",
            "partials = M // _PARTIAL_ROWS",
            TILES,
        ),
        (
            "partial sums of db1 a tile further down",
            "store_tile(dst, sums, row // _PARTIAL_ROWS,",
            "store_tile(dst, sums, row // BLOCK_M,",
            "test_kernels.py -k 'test_every_configuration_row and linear_dact and 128x64'",
        ),
        ("d_gate and d_up swapped", "d_pre, d_pre[:, N:])", "d_pre[:, N:], d_pre)", BACKWARD),
        ("d_gate without the derivative", "acc *= derivative", "acc += 0.0", BACKWARD),
        ("recomputed hidden without up", "value * factor", "value", BACKWARD),
        ("db1 of up stored over gate's", "db_partial_ptr + N", "db_partial_ptr", BACKWARD),
        (
            "right half of an epilogue at the left half's columns",
            "parts[i], pre_act, d_pre, act, db_partial_ptr, tile_m, col + i * PART_N,",
            "parts[i], pre_act, d_pre, act, db_partial_ptr, tile_m, col,",
            ROWS,
        ),
        (
            "gate's descriptor as wide as d_pre",
            HALF.format("N", like="dy"),
            HALF.format("width", like="dy"),
            GUARD_PAGES,
        ),
    ],
    "kernels/matmul.py": [
        ("launch reused for another precision", "_configs.arithmetic_of(a.dtype)", '"ieee"', TF32),
        (
            "fp32 result of 16-bit operands through 16 bits",
            "None, None, out_dtype or dy.dtype, False, config, by_torch)",
            "None, None, dy.dtype, False, config, by_torch).to(out_dtype or dy.dtype)",
            TILES,
        ),
        ("main_grad overwritten instead of added to", '"ACCUMULATE": dw is not None', '"ACCUMULATE": False', TILES),
        (
            "fp32 weight gradient through 16 bits",
            "    out_dtype = out_dtype or dy.dtype\n",
            "    if out_dtype not in (None, dy.dtype):\n        return wgrad(dy, x, None, config).to(out_dtype)\n"
            "    out_dtype = dy.dtype\n",
            TILES,
        ),
        (
            "bias read where there is none",
            '"HAS_BIAS": bias is not None',
            '"HAS_BIAS": True',
            "test_kernels.py -k missing_bias",
        ),
    ],
    "kernels/_launch.py": [
        ("alignment of the base ignored", "t.residue == 0", "True", NO_TMA),
        ("rows that overlap sent to TMA", "and t.strides[0] >= t.shape[1]", "", AT_ONCE),
        ("any dtype stored", "if dtype not in SUPPORTED_DTYPES", "if False", REJECTED),
        ("odd strides sent to TMA", "t.strides[0] % step == 0", "True", AT_ONCE),
        ("odd widths sent to pointers", "and (by_tma or t.shape[1] % step == 0)\n", "\n", AT_ONCE),
        ("launch reused for another alignment", "t.device, t.data_ptr() % 16\n", "t.device, 0\n", NO_TMA),
        ("launch reused for another M", "_keep = lru_cache(maxsize=2048)\n", SHAPELESS, COLUMN_SUM),
        (
            "descriptor reused for another address",
            "descriptor = self._known.get(address)",
            "descriptor = next(iter(self._known.values()), None)",
            JIT,
        ),
    ],
    "kernels/_configs.py": [
        ("TF32 asked for, IEEE computed", '"tf32": "tf32", "ieee"', '"tf32": "ieee", "ieee"', TF32),
        ("TF32 refused", 'fp32_precision == "tf32" else "ieee"', 'fp32_precision == "tf32x3" else "ieee"', PRECISION),
        ("TF32 unasked", 'fp32_precision == "tf32" else "ieee"', 'fp32_precision != "" else "ieee"', PRECISION),
        (
            "IEEE arithmetic with TF32 dots",
            '"ieee": "ieee"}',
            '"ieee": "tf32"}',
            "test_kernels.py -k 'test_gemm and float32'",
        ),
    ],
}
