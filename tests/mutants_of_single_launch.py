"""Mistakes in how one launch hands act from one GEMM to the other: file → (name, text, replacement, tests that notice).

The simulator must catch those of the protocol. They are quick, so `make test` makes them too: in
test_single_launch_mutants.py, beside those that the lint (lint_mutants.py) and the model (model_mutants.py)
catch.
"""

SIMULATOR = "test_single_launch_schedules.py -k 'any_schedule and gelu-pointers'"
SIMULATOR_OF_FEW = "test_single_launch_schedules.py -k 'few_tokens and gelu-slices'"
FEW = "test_few_tokens.py -k {}"
COUNTERS = "test_counters.py -k {}"
SINGLE = "test_single_launch.py -k {}"
FORMS = "test_forward.py"
JIT = "test_compile_gate.py -k 'what_launches_do and sm_90 and installed'"

COUNT = 'tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")'
POLL = 'tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < act_tiles'
WAIT = f"    while {POLL}:\n        pass\n"
LAST = "before == act_tiles + y_tiles - 1"
RESET = 'tl.atomic_xchg(counter_ptr, 0, sem="relaxed", scope="gpu")'
TICKET = 'tl.atomic_add(counters_ptr, 1, sem="relaxed", scope="gpu")'
TICKETS = "tl.cdiv(M, BLOCK_M) * (act_tiles + y_tiles)"
TICKET_RESET = 'tl.atomic_xchg(counters_ptr, 0, sem="relaxed", scope="gpu")'
COUNT_SLICE = 'tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")'
HALF = "acc = sum_of_slices(partial_ptr, BLOCK_M * BLOCK_N,"
LAST_SLICE = "last = before == SPLIT_K - 1"
RESET_SLICES = 'tl.atomic_xchg(counter_ptr, 0, sem="relaxed", scope="gpu")'
PUBLISHED = "        publish(counter_ptr, USE_TMA)\n"

MUTANTS = {
    "kernels/ffn_single_launch.py": [
        ("relaxed flag", COUNT, COUNT.replace("release", "relaxed"), SIMULATOR),
        ("relaxed wait", POLL, POLL.replace("acquire", "relaxed"), SIMULATOR),
        ("flag for the own program", COUNT, COUNT.replace("gpu", "cta"), SIMULATOR),
        ("wait for the own program", POLL, POLL.replace("gpu", "cta"), SIMULATOR),
        ("no wait", WAIT, "", SIMULATOR),
        ("wait for all tiles of act but one", POLL, f"{POLL} - 1", SIMULATOR),
        ("wait for a tile of act too many", POLL, f"{POLL} + 1", SIMULATOR),
        ("wait for the row block before", "counters_ptr + 1 + tile_m", "counters_ptr + 2 - stage + tile_m", SIMULATOR),
        ("counted before it is stored", "    if stage == 1:\n", f"    if stage == 1:\n{PUBLISHED}", SIMULATOR),
        ("never counted", PUBLISHED, "", SIMULATOR),
        ("consumers first", "ticket = tl.atomic_add(", f"ticket = {TICKETS} - 1 - tl.atomic_add(", SIMULATOR),
        ("program ids for tickets", TICKET, "tl.program_id(0)", SIMULATOR),
        ("row blocks never reset", RESET, "pass", SIMULATOR),
        ("row blocks reset by the first that is done", LAST, "before == act_tiles", SIMULATOR),
        ("row blocks reset to what they were", RESET, RESET.replace(" 0,", " act_tiles,"), SIMULATOR),
        ("tickets never reset", TICKET_RESET, "pass", SIMULATOR),
        (
            "tickets that wrap, M changed",
            f"{TICKET}\n    if ticket == {TICKETS} - 1:\n        {TICKET_RESET}\n",
            f"{TICKET} % ({TICKETS})\n",
            SIMULATOR,
        ),
        (
            "gate's descriptor as wide as pre_act, in one launch",
            "half = Operand(act.shape, (w1.shape[0], 1)",
            "half = Operand((act.shape[0], w1.shape[0]), (w1.shape[0], 1)",
            "test_memory.py -k 'test_guard_pages and end'",
        ),
        (
            "b2's bias taken for b1's",
            "x, w1, act_ptr, pre_act, b1_ptr, tile_m",
            "x, w1, act_ptr, pre_act, b2_ptr, tile_m",
            SINGLE.format("out_dtype"),
        ),
        (
            "single launch that compiles for each M",
            '@triton.jit(do_not_specialize=["M"])\ndef ffn_kernel',
            "@triton.jit\ndef ffn_kernel",
            JIT,
        ),
    ],
    "kernels/ffn_few_tokens.py": [
        ("slice counted relaxed", COUNT_SLICE, COUNT_SLICE.replace("acq_rel", "relaxed"), SIMULATOR_OF_FEW),
        ("slice counted without acquiring", COUNT_SLICE, COUNT_SLICE.replace("acq_rel", "release"), SIMULATOR_OF_FEW),
        ("slice counted without releasing", COUNT_SLICE, COUNT_SLICE.replace("acq_rel", "acquire"), SIMULATOR_OF_FEW),
        ("slice counted for the own program", COUNT_SLICE, COUNT_SLICE.replace("gpu", "cta"), SIMULATOR_OF_FEW),
        ("slices added by the last but one", LAST_SLICE, LAST_SLICE.replace("- 1", "- 2"), SIMULATOR_OF_FEW),
        ("slices counted for ever", RESET_SLICES, "pass", SIMULATOR_OF_FEW),
        ("slices in one place", "partial_ptr + part * SLICE", "partial_ptr", SIMULATOR_OF_FEW),
        ("tiles' slices in one place", "tile.to(tl.int64) * (SPLIT_K", "0 * (SPLIT_K", SIMULATOR_OF_FEW),
        (
            "slices apart by half of what they are",
            "acc = sum_of_slices(partial_ptr, stride,",
            HALF,
            FEW.format("exact"),
        ),
        ("slices of one counter for all tiles", "counters_ptr + 2 + tile", "counters_ptr + 2", SIMULATOR_OF_FEW),
        ("few tokens: no wait", "        wait_for_tiles(ready_ptr, act_tiles, USE_TMA)\n", "", SIMULATOR_OF_FEW),
        (
            "few tokens: wait for all tiles but one",
            "wait_for_tiles(ready_ptr, act_tiles",
            "wait_for_tiles(ready_ptr, act_tiles - 1",
            SIMULATOR_OF_FEW,
        ),
        (
            "few tokens: one tile of y leaves for all of its slices",
            "act_tiles, y_tiles * SPLIT_K)",
            "act_tiles, y_tiles)",
            SIMULATOR_OF_FEW,
        ),
        ("few tokens: program ids for tickets", TICKET, "tl.program_id(0)", SIMULATOR_OF_FEW),
        (
            "few tokens: consumers first",
            "tile = ticket // SPLIT_K",
            "tile = act_tiles + y_tiles - 1 - ticket // SPLIT_K",
            SIMULATOR_OF_FEW,
        ),
        ("few tokens: tickets never reset", TICKET_RESET, "pass", SIMULATOR_OF_FEW),
        (
            "slices that overlap",
            "first_k, tl.minimum(first_k + length, K)",
            "first_k, tl.minimum(first_k + length + 1, K)",
            FEW.format("exact"),
        ),
        (
            "act's last slice left out",
            "tl.static_range(1, SPLIT_K)",
            "tl.static_range(1, SPLIT_K - 1)",
            FEW.format("exact"),
        ),
        ("b2 dropped for few tokens", "        if HAS_B2:\n", "        if False:\n", FEW.format("exact")),
        ("w2 prefetched past its rows", "BLOCK_N), rows - 1)", "BLOCK_N), rows + 9)", FEW.format("prefetched")),
        ("w2 prefetched past its slice", "* STEP, cols - 1)", "* STEP, cols + 99)", FEW.format("prefetched")),
        (
            "w2 prefetched from its first column",
            "H, first_k, end_k, stride_w2",
            "H, 0, end_k, stride_w2",
            FEW.format("prefetched"),
        ),
        (
            "few tokens that are too many",
            "if config.BLOCK_M < M:",
            "if config.BLOCK_M < M - 8:",
            FEW.format("rejected"),
        ),
        (
            "few tokens that compile for each M",
            '@triton.jit(do_not_specialize=["M"])\ndef few_tokens_kernel',
            "@triton.jit\ndef few_tokens_kernel",
            JIT,
        ),
    ],
    "kernels/_configs.py": [
        (
            "rows for few tokens that do not fit them",
            "if rows <= row.BLOCK_M]",
            "if rows // 2 <= row.BLOCK_M]",
            FEW.format("the_row"),
        ),
        ("slices by the tiles of act alone", "min(cols, inner)", "cols", FEW.format("the_row")),
        ("slices where tiles suffice", "config.SPLIT_K >= 0.75 *", "config.SPLIT_K >= 1.5 *", FEW.format("the_row")),
    ],
    "kernels/_counters.py": [
        ("counters that do not grow", "count > len(kept)", "count > 9 * len(kept)", COUNTERS.format("grow")),
        ("counters of a failed launch kept", "if kept is used]", "if kept is None]", SINGLE.format("that_failed")),
        (
            "streams that share counters",
            "torch.cuda.current_stream(device).cuda_stream",
            "0",
            COUNTERS.format("streams"),
        ),
        (
            "captured launches that share counters",
            "_reserves[device] = left[lines:]",
            "pass",
            COUNTERS.format("captured"),
        ),
        (
            "captured launches with a stream's counters",
            "is_current_stream_capturing():",
            "is_initialized() is None:",
            COUNTERS.format("captured"),
        ),
        (
            "counters that share a cache line",
            "lines = -(-count // _LINE) * _LINE",
            "lines = count",
            COUNTERS.format("captured"),
        ),
    ],
    "kernels/forward.py": [
        ("one launch up to one tile less", "in_one_launch(arch, tiles)", "in_one_launch(arch, tiles + 1)", FORMS),
        ("empty sizes in one launch", "and 0 in (M, N, H):", "and 0 in (M, N):", FORMS),
        ("dependent launches on any architecture", "if arch in DEPENDENT_LAUNCHES:", "if True:", FORMS),
        ("unknown form accepted", "form not in (None, *FORMS)", "False", FORMS),
        ("pre_act kept for act", 'act if keep == "act" else pre_act', "pre_act", FORMS),
    ],
    "kernels/matmul.py": [
        ("dependent launch that does not wait", "    if IS_DEPENDENT:\n        wait_for_launch()\n", "", JIT),
        ("every launch a dependent one", "if dependent else {}", "if not dependent else {}", JIT),
    ],
    "kernels/_tiles.py": [
        ("rows past M of another row block", "tl.minimum(offs_m, M - 1)", "offs_m % M", SIMULATOR),
    ],
}
