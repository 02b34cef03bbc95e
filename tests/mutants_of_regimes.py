"""Mistakes in what is chosen where: measured rows, torch's own GEMMs, batch-invariant forwards; for mutants.py:
file → (name, text, replacement, tests that must notice)."""

INVARIANT = "test_batch_invariant.py -k {}"
TUNED = "test_tuned.py -k {}"

MUTANTS = {
    "kernels/_tuned.py": [
        ("measured rows used at any size", "math.log(NEAR) + 1e-9", "100.0", TUNED.format("near_its_sizes")),
        (
            "measured rows used at their own sizes alone",
            "math.log(NEAR) + 1e-9",
            "1e-9",
            TUNED.format("near_its_sizes"),
        ),
        ("the first measured row instead of the nearest", "apart < least)", "False)", TUNED.format("nearest_of")),
        (
            "rows measured in another arithmetic",
            "(measured.kernel, measured.arithmetic) == (kernel, arithmetic)",
            "measured.kernel == kernel",
            TUNED.format("near_its_sizes"),
        ),
        (
            "files of another triton",
            '.split(".")[:2] != triton',
            '.split(".")[:0] != triton',
            TUNED.format("wrong_file"),
        ),
        ("files of another GPU", "if name != device:", "if False:", TUNED.format("another_gpus")),
        ("tiles of any size", "not low <= value <= high", "False", TUNED.format("wrong_file")),
        (
            "true for a number",
            "type(value) is not type(low)",
            "not isinstance(value, type(low))",
            TUNED.format("wrong_file"),
        ),
        ("torch for kernels that it does not have", "kernel not in TORCH_INSTEAD", "False", TUNED.format("wrong_file")),
        (
            "a loaded file behind the package's own",
            "(*rows, *_of(device))",
            "(*_of(device), *rows)",
            TUNED.format("comes_first"),
        ),
    ],
    "kernels/_launch.py": [
        (
            "tiles by the stride of a single row",
            "if len(shape) == 2 and shape[0] == 1:",
            "if False:",
            INVARIANT.format("single_row"),
        ),
        ("a loaded file not used for prepared launches", "kept.cache_clear()", "pass", TUNED.format("comes_first")),
    ],
    "kernels/_configs.py": [
        (
            "measured rows for an architecture that is only named",
            'if arch is not None or like.device.type != "cuda":',
            'if like.device.type != "cuda":',
            TUNED.format("near_its_sizes"),
        ),
        (
            "a measured row that is too small for its tokens",
            "and rows <= measured.config.BLOCK_M",
            "and 1 <= measured.config.BLOCK_M",
            TUNED.format("must_fit"),
        ),
        (
            "batch-invariant by the last row",
            "if config.BLOCK_N <= 64), table[-1])",
            "if config.BLOCK_N <= 0), table[-1])",
            INVARIANT.format("form_and_tiles"),
        ),
    ],
    "kernels/matmul.py": [
        ("torch's GEMM without its bias", "if self.has_bias:", "if False:", TUNED.format("plain_gemms")),
        ("torch's GEMM of the untransposed", "b.t() if self.trans_b else b", "b", TUNED.format("plain_gemms")),
        (
            "torch's GEMM for another dtype",
            "config is None and out_dtype == a.dtype and",
            "config is None and",
            TUNED.format("plain_gemms"),
        ),
        (
            "torch's GEMM instead of the caller's configuration",
            "by_torch and config is None and out_dtype == dy.dtype",
            "by_torch and out_dtype == dy.dtype",
            TUNED.format("plain_gemms"),
        ),
        (
            "torch's GEMM that records gradients",
            "with torch.no_grad():",
            "with torch.enable_grad():",
            TUNED.format("a_layer_whose"),
        ),
    ],
    "kernels/forward.py": [
        (
            "batch-invariant rows for few tokens",
            "    if batch_invariant:\n        return _b",
            "    if False:\n        return _b",
            INVARIANT.format("form_and_tiles"),
        ),
        ("tiles by where x lies", "x.data_ptr() % 16", "False", INVARIANT.format("every_launch")),
        (
            "the tables' tiles in a batch-invariant launch",
            "save_pre_act, out_dtype, config)\n    else",
            "save_pre_act, out_dtype)\n    else",
            INVARIANT.format("every_launch"),
        ),
        (
            "measured tiles that choose the form",
            "*matrices, arch=arch), M, N)[0]",
            "*matrices, arch=asked), M, N)[0]",
            TUNED.format("change_the_form"),
        ),
        (
            "torch's GEMM waited for where it is not called",
            "by_torch = by_torch and out_dtype in (None, x.dtype)",
            "by_torch = bool(by_torch)",
            TUNED.format("whose_gemm"),
        ),
        ("dependent launch that waits for torch", "if faster is not None:", "if False:", TUNED.format("explain_names")),
    ],
    "tpffn_triton/native.py": [
        (
            "bits by what backward keeps",
            "linear_act(rows, w1, b1, activation, True)",
            'linear_act(rows, w1, b1, activation, keep == "pre_act")',
            INVARIANT.format("'bits_of_a_token and bfloat16'"),
        ),
        (
            "y a view of padded rows",
            "torch.cat([*parts[:-1], parts[-1][:last]])",
            "torch.cat(parts)[:tokens]",
            INVARIANT.format("in_place"),
        ),
        (
            "one GEMM for all tokens",
            "padded.split(ROWS_OF_A_BLOCK)",
            "padded.split(len(padded))",
            INVARIANT.format("real_layer"),
        ),
    ],
    "tpffn_triton/passes.py": [
        (
            "vmap refused once y is computed",
            "if call.batch_invariant and call.group is not None:\n        for",
            "if False:\n        for",
            INVARIANT.format("over_ranks"),
        ),
        (
            "ring all-reduce in a batch-invariant forward",
            "_sum_in_order(y, call) if call.batch_invariant else wait(_start_sum(y, call))",
            "wait(_start_sum(y, call))",
            INVARIANT.format("over_ranks"),
        ),
        (
            "the last rank's part dropped",
            "for part in parts[1:]:",
            "for part in parts[1:-1]:",
            INVARIANT.format("over_ranks"),
        ),
    ],
    "tpffn_triton/functional.py": [
        (
            "ranks that differ in batch_invariant",
            'options.append("batch_invariant")',
            "pass",
            INVARIANT.format("ranks_agree"),
        ),
    ],
}
