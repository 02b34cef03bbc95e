"""Mistakes in the cost model for mutants.py to make: file → (name, text, replacement, tests that must notice)."""

BY_HAND = "test_cost_model.py -k by_hand"
PREDICTED = "test_predict.py -k 'by_hand or overlap or chunk'"

MUTANTS = {
    "tpffn_triton/cost_model.py": [
        ("ring one round short", '"ring": (2 * (p - 1)', '"ring": (2 * (p - 2)', BY_HAND),
        ("a chain between nodes too", "if between_nodes else p - 1)", "if False else p - 1)", BY_HAND),
        ("a binary tree within a node", "if between_nodes else p - 1)", "if True else p - 1)", BY_HAND),
        ("one-shot sends the tensor once", "(1, (p - 1) * nbytes)", "(1, nbytes)", BY_HAND),
        ("the slowest protocol", "return min(times) if", "return max(times) if", "test_cost_model.py -k protocol"),
        ("whole tensor between nodes", "nbytes / local, nodes, ", "nbytes, nodes, ", BY_HAND),
        ("launch forgotten", " + compute.launch_us", "", BY_HAND),
        ("memory never the bound", "return max(arithmetic_us, ", "return max(arithmetic_us, 0 * ", BY_HAND),
        ("every chunk hides", "map(min, times, gemms[1:])", "map(min, times, gemms)", BY_HAND),
        (
            "chunks of any height",
            "-(-each // CHUNK_ROWS) * CHUNK_ROWS",
            "each",
            "test_cost_model.py -k rows_of",
        ),
        ("y written in the GEMM's dtype", "read + nbytes))", "read + rows * hidden * itemsize))", BY_HAND),
        (
            "symmetric memory taken for granted",
            "algorithms: tuple[str, ...] | None = LIBRARY_ALGORITHMS,\n) -> int:",
            "algorithms: tuple[str, ...] | None = None,\n) -> int:",
            "test_predict.py -k automatic",
        ),
        ("chunks pay no second read of w2", " + hidden * shard_features)", ")", PREDICTED),
        (
            "chunks reduced in the GEMM's dtype",
            "(reduced_itemsize or itemsize)",
            "itemsize",
            "test_cost_model.py -k cheapest",
        ),
    ],
    "tpffn_triton/presets.py": [
        ("rings' own latency with a rank a node", "5.0 if alone else 2.7", "2.7", "test_cost_model.py -k rank_a_node"),
        ("LL's cap for every rank", "share = cap / ranks_per_node", "share = cap", "test_cost_model.py -k rank_a_node"),
    ],
    "tpffn_triton/predict.py": [
        ("all communication hidden", "beside = min(us, ", "beside = max(us, ", PREDICTED),
        ("nothing slowed", "(1 - compute.overlap) * beside", "0 * beside", PREDICTED),
        ("room for every P", "if plan.tp > room:", "if plan.tp < 0:", "test_predict.py -k more_ranks"),
    ],
    "tpffn_triton/plan_communication.py": [
        (
            "slice sent to every rank twice",
            "rounds * (elements // world_size), ",
            "world_size * (elements // world_size), ",
            "test_plan_sequence_parallel.py -k all_reduce",
        ),
        (
            "payload of an all-gather is a rank's part",
            "payload = max(",
            "payload = min(",
            "test_plan_partitionings.py -k table",
        ),
        (
            "x of slices gathered once",
            'yield Reason("backward", "x", "all_gather", ',
            'yield Reason("backward", "x", None, ',
            "test_plan_partitionings.py -k reason",
        ),
    ],
    "tpffn_triton/plan_schedule.py": [
        (
            "dx waited for before dw1",
            'else ("db1", "dw2", "dw1", "db2")',
            'else ("db1", "dw2")',
            "test_plan_sequence_parallel.py -k analysed",
        ),
        (
            "all-reduce needs a second buffer",
            'if op.kernel == "all_reduce":',
            "if False:",
            "test_plan_memory.py -k 'column_row and gelu'",
        ),
        (
            "what is kept freed after its last use",
            "*saved, *RESULTS}",
            "*RESULTS}",
            "test_plan_memory.py -k 'row_column and gelu'",
        ),
        (
            "input of a collective freed at its start",
            "max(number, *hiding, ",
            "max(number, ",
            "test_plan_memory.py -k 'slices and gelu'",
        ),
        (
            "partial sums gathered, not added",
            's.add("pre_act", "reduce_scatter", ',
            's.add("pre_act", "all_gather", ',
            "test_plan_partitionings.py -k table",
        ),
    ],
    "tpffn_triton/plan.py": [
        (
            "P that divides no H accepted",
            "        if size % tp:",
            "        if False:",
            "test_plan_partitionings.py -k one_line",
        ),
        (
            "gathered hidden not kept",
            'kept += ("full_hidden",)',
            "kept += ()",
            "test_plan_memory.py -k 'column_column and gelu'",
        ),
    ],
    "tpffn_triton/machines.py": [
        ("unknown keys accepted", "if name not in names]", "if name in ()]", "test_machines.py -k breaks_the_schema"),
        (
            "NaN accepted",
            "(int, float)) or not low <= value <= high",
            "(int, float)) or value < low or value > high",
            "test_machines.py -k breaks_the_schema",
        ),
        ("nearest P above", "if p <= world_size]", "if p >= world_size]", "test_machines.py -k how_many"),
    ],
    "bench/comm_fit.py": [
        (
            "absolute errors",
            "return np.log(t / (ratios[:, None] + x))",
            "return t * np.log(t / (ratios[:, None] + x))",
            "test_comm_bench.py -k 'noise or recovers'",
        ),
        (
            "α never 0",
            "np.array([0.0, ratios[best]])",
            "ratios[best : best + 1]",
            "test_comm_bench.py -k never_negative",
        ),
        (
            "slope by the mean time",
            "np.exp(left[best].mean())",
            "np.exp(left[best]).mean()",
            "test_comm_bench.py -k noise",
        ),
    ],
}
