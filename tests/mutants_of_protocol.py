"""Mistakes in how one launch hands act from one GEMM to the other: file → (name, text, replacement, tests that notice).

The simulator must catch those of the protocol. They are quick, so `make test` makes them too: in
test_single_launch_mutants.py, beside those that the lint (publish_mutants.py) and the model (protocol_mutants.py)
catch.
"""

SIMULATOR = "test_single_launch_schedules.py -k 'any_schedule and gelu-pointers'"
COUNTERS = "test_single_launch.py -k {}"
FORMS = "test_forward.py"

COUNT = 'tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")'
POLL = 'tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < act_tiles'
WAIT = f"    while {POLL}:\n        pass\n"
LAST = "seen == act_tiles + y_tiles - 1"
RESET = 'tl.atomic_xchg(counter_ptr, 0, sem="relaxed", scope="gpu")'
TICKET = 'tl.atomic_add(counters_ptr, 1, sem="relaxed", scope="gpu")'
TICKETS = "tl.cdiv(M, BLOCK_M) * (act_tiles + y_tiles)"
TICKET_RESET = 'tl.atomic_xchg(counters_ptr, 0, sem="relaxed", scope="gpu")'
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
        ("row blocks reset by the first who waited", LAST, "seen == act_tiles", SIMULATOR),
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
            "half = Operand((M, N), (W, 1)",
            "half = Operand((M, W), (W, 1)",
            "test_memory.py -k 'test_guard_pages and end'",
        ),
        (
            "b2's bias taken for b1's",
            "x, w1, act_ptr, pre_act, b1_ptr, tile_m",
            "x, w1, act_ptr, pre_act, b2_ptr, tile_m",
            "test_single_launch.py -k out_dtype",
        ),
        (
            "single launch that compiles for each M",
            '@triton.jit(do_not_specialize=["M"])\ndef ffn_kernel',
            "@triton.jit\ndef ffn_kernel",
            "test_compile_gate.py -k 'what_launches_do and sm_90 and installed'",
        ),
    ],
    "kernels/_counters.py": [
        ("counters that do not grow", "count > len(kept)", "count > 9 * len(kept)", COUNTERS.format("counters_grow")),
        ("counters of a failed launch kept", "if kept is used]", "if kept is None]", COUNTERS.format("that_failed")),
    ],
    "kernels/forward.py": [
        ("one launch up to one tile less", "in_one_launch(arch, tiles)", "in_one_launch(arch, tiles + 1)", FORMS),
        ("empty sizes in one launch", "if 0 in (M, N, H):", "if 0 in (M, N):", FORMS),
        ("dependent launches on any architecture", "if arch in DEPENDENT_LAUNCHES:", "if True:", FORMS),
        ("pre_act kept for act", 'act if keep == "act" else pre_act', "pre_act", FORMS),
    ],
    "kernels/_tiles.py": [
        ("rows past M of another row block", "tl.minimum(offs_m, M - 1)", "offs_m % M", SIMULATOR),
    ],
}
