"""Mistakes in the one launch of all weight gradients, for mutants.py: file → (name, text, replacement, tests)."""

TESTS = "test_weight_grads.py -k '{}'"
INTEGERS = TESTS.format("small_integers and tiny and float32 and {}")
FORM = TESTS.format("which_form")

MUTANTS = {
    "kernels/weight_grads.py": [
        (
            "db2 summed from db1's source",
            "_sum_columns(db2_src_ptr, db2_ptr,",
            "_sum_columns(db_partial_ptr, db2_ptr,",
            INTEGERS.format("tiles"),
        ),
        (
            "db2's columns taken from db1's on",
            "pid - first_db2, T, H",
            "pid, T, H",
            INTEGERS.format("tiles"),
        ),
        (
            "db2 summed over all tokens",
            "pid - first_db2, T, H",
            "pid - first_db2, M, H",
            INTEGERS.format("tiles"),
        ),
        (
            "step of a sum left out",
            "in tl.static_range(_SUM_LOADS)",
            "in tl.static_range(_SUM_LOADS - 1)",
            TESTS.format("many_rows"),
        ),
        (
            "last rows of a sum left out",
            "in range(0, R, _SUM_ROWS * _SUM_LOADS)",
            "in range(0, R // (_SUM_ROWS * _SUM_LOADS) * _SUM_ROWS * _SUM_LOADS, _SUM_ROWS * _SUM_LOADS)",
            TESTS.format("many_rows"),
        ),
        (
            "sum through bf16",
            "tl.sum(acc, axis=0).to(out_ptr",
            "tl.sum(acc, axis=0).to(tl.bfloat16).to(out_ptr",
            TESTS.format("many_rows"),
        ),
        (
            "first tile of dw2 computed as one of dw1",
            "        if pid < first_dw2:\n            tile",
            "        if pid <= first_dw2:\n            tile",
            INTEGERS.format("tiles"),
        ),
        (
            "dw2 as wide as dw1's rows",
            "pid - first_dw2, H, F",
            "pid - first_dw2, H, W",
            INTEGERS.format("gated"),
        ),
        (
            "act read with the stride of x",
            "dy, act, dw2, stride_dy, stride_act",
            "dy, act, dw2, stride_dy, stride_x",
            INTEGERS.format("gated"),
        ),
        (
            "main_grads overwritten instead of added to",
            '"ACCUMULATE": grads is not None',
            '"ACCUMULATE": False',
            INTEGERS.format("smoke"),
        ),
        (
            "no programs for the sums of db2",
            "triton.cdiv(src.shape[1], SUM_COLS) for src in summed)",
            "triton.cdiv(src.shape[1], SUM_COLS) for src in summed[:1])",
            INTEGERS.format("smoke"),
        ),
        ("one launch however large", "Form(row if one else None,", "Form(row,", FORM),
        ("size of the smaller gradient", "tiles = max(", "tiles = min(", FORM),
        ("one launch for gradients of two dtypes", "if dw1.dtype != dw2.dtype:", "if False:", FORM),
        (
            "strides of act not looked at",
            "operands = d_pre, x, dy, act, dw1",
            "operands = d_pre, x, dy, dw1",
            TESTS.format("apart_misaligned"),
        ),
        (
            "one launch that compiles for each number of tokens",
            'do_not_specialize=["M", "R", "T"]',
            'do_not_specialize=["M", "R"]',
            "test_compile_gate.py -k 'what_launches_do and sm_90 and installed'",
        ),
    ],
    "tpffn_triton/passes.py": [
        (
            "dw1 not apart while x is in flight",
            "if need_w1 and need_w2 and not x_in_flight:",
            "if need_w1 and need_w2:",
            "test_sequence_parallel.py -k in_flight",
        ),
        (
            "db2 of all ranks' tokens in one launch",
            "own_dy if need_b2 else None",
            "dy if need_b2 else None",
            "test_sequence_parallel.py -k 'slices_equal and native-2 and float32 and silu'",
        ),
        (
            "main_grads of the weights swapped",
            "weight_grads_accumulate(w1.main_grad, w2.main_grad,",
            "weight_grads_accumulate(w2.main_grad, w1.main_grad,",
            "test_precision.py -k main_grad_accumulates",
        ),
        (
            "weight gradients of one launch through autocast's dtype",
            "kernels.weight_grads(*matrices, *biases, *wanted.dtypes[1:])",
            "kernels.weight_grads(*matrices, *biases, None, None, *wanted.dtypes[3:])",
            "test_precision.py -k autocast",
        ),
        (
            "bias gradients of one launch through autocast's dtype",
            "kernels.weight_grads(*matrices, *biases, *wanted.dtypes[1:])",
            "kernels.weight_grads(*matrices, *biases, *wanted.dtypes[1:3], *[matrices[0].dtype] * 2)",
            "test_precision.py -k autocast",
        ),
    ],
    "tpffn_triton/partitioned.py": [
        (
            "all-reduce of dx waited for before the weight gradients",
            "            dx = call.start(p.x.backward, kernels.dgrad(d_pre, w1))\n",
            "            dx = call.finish(p.x.backward, call.start(p.x.backward, kernels.dgrad(d_pre, w1)))\n",
            "test_partitioned_collectives.py -k 'in_flight and column_row'",
        ),
    ],
    "tpffn_triton/native.py": [
        (
            "native db1 counted once for each partial sum",
            "db_partial[:1] = ",
            "db_partial[:] = ",
            "test_distributed.py -k 'ranks_equal_the_unsharded_reference and 2- and float32-native and relu-'",
        ),
    ],
    "tpffn_triton/ops.py": [
        (
            "fake db_partial without its last row",
            "(tokens + PARTIAL_ROWS - 1) // PARTIAL_ROWS",
            "tokens // PARTIAL_ROWS",
            "test_ops.py -k fake_shapes",
        ),
        (
            "FLOPs of dw2 not counted",
            "_wgrad_flops(d_pre_shape, x_shape) + _wgrad_flops(dy_shape, act_shape)",
            "_wgrad_flops(d_pre_shape, x_shape)",
            "test_pytorch.py -k flop",
        ),
    ],
    "tpffn_triton/plan_schedule.py": [
        (
            "what is computed at once allocated one after the other",
            "key=lambda op: op.at_once or op",
            "key=lambda op: op",
            "test_plan_memory.py -k 'column_row and gelu'",
        ),
    ],
    "tpffn_triton/plan.py": [
        (
            "partial sums of db1 in the layer's dtype",
            'sizes = {"db1_partial": DTYPE_BYTES["fp32"]}',
            "sizes = {}",
            "test_plan.py -k odd_shape",
        ),
    ],
}
