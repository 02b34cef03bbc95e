"""Mistakes in what ranks exchange, for mutants.py to make: file → (name, text, replacement, tests that must notice)."""

SLICES = "test_sequence_parallel.py -k 'slices_equal and native-2 and float32 and relu-'"
REGIONS = "test_sequence_parallel.py -k gradients_of_regions"
BLOCK = "test_sequence_parallel.py -k block_between"
SUMMED = "test_sequence_parallel.py -k summed_once"
MARK = "test_sequence_parallel.py -k megatrons_mark"
RING = "test_traffic_bench.py -k ring_adds"
SOCKET = "test_traffic_bench.py -k socket_counts"
NOT_NEW = "test_traffic_bench.py -k not_new"

MUTANTS = {
    "tpffn_triton/passes.py": [
        ("x not gathered", "tokens = wait(_start_gather(tokens, call))", "pass", SLICES),
        (
            "slice of x for dw1",
            "x_in_flight = slices and need_w1 and not recompute",
            "x_in_flight = False",
            SLICES,
        ),
        (
            "x waited for before dgrad",
            "    if x_in_flight:\n        x = _start_gather(x, call)",
            "    if x_in_flight:\n        x = wait(_start_gather(x, call))",
            "test_sequence_parallel.py -k in_flight",
        ),
        (
            "db2 of all ranks' tokens",
            "kernels.column_sum(own_dy, wanted.dtypes[4])",
            "kernels.column_sum(wait(_start_gather(own_dy, call)), wanted.dtypes[4])",
            SLICES,
        ),
        (
            "dy gathered for db2",
            "gather_dy = slices and wanted.all_dy",
            "gather_dy = slices",
            "test_sequence_parallel.py -k collectives_and",
        ),
        (
            "chunk waited for before the next",
            "        started.append(_start_sum(part, call))",
            "        started.append(wait(_start_sum(part, call)))",
            "test_reductions.py -k in_flight",
        ),
        ("chunk not reduced", "        started.append(_start_sum(part, call))", "", "test_reductions.py -k row_chunks"),
        (
            "dx reduced in 16 bits",
            "dx = kernels.dgrad(d_pre, w1, call.reduce_dtype)",
            "dx = kernels.dgrad(d_pre, w1)",
            "test_reductions.py -k 'fp32_reduction and native'",
        ),
    ],
    "tpffn_triton/collectives.py": [
        ("all-reduce of any strides", "if not t.is_contiguous():", "if False:", "test_distributed.py -k sub_mesh"),
        (
            "group of one rank that communicates",
            "return tp_group if tp_group.size() > 1 else None",
            "return tp_group",
            "test_distributed.py -k group_of_one",
        ),
        (
            "parts of different size reduce-scattered",
            "if t.dim() < 1 or t.shape[0] % world_size:",
            "if t.dim() < 1:",
            "test_sequence_parallel.py -k p_does_not_divide",
        ),
        (
            "batched gather",
            "if not torch.compiler.is_compiling() and is_batchedtensor(t):",
            "if False:",
            "test_sequence_parallel.py -k pytorchs_modes",
        ),
    ],
    "tpffn_triton/regions.py": [
        (
            "region that sums into what it was given",
            "t.contiguous() if consume else t.clone(memory_format=torch.contiguous_format)",
            "t.contiguous()",
            "test_distributed.py -k regions_sum",
        ),
        (
            "gradient of a gather not summed",
            "own = reduce_scatter(dy.contiguous(), ctx.group) if ctx.reduce_grad else _slice_of(dy, ctx.group)",
            "own = _slice_of(dy, ctx.group)",
            REGIONS,
        ),
        (
            "gradient of a replicated output summed",
            "own = reduce_scatter(dy.contiguous(), ctx.group) if ctx.reduce_grad else _slice_of(dy, ctx.group)",
            "own = reduce_scatter(dy.contiguous(), ctx.group)",
            REGIONS,
        ),
        ("slice of rank 0 everywhere", "[group.rank()].clone", "[0].clone", BLOCK),
    ],
    "tpffn_triton/replicated_grads.py": [
        ("marked parameters left out", 'getattr(parameter, "sequence_parallel", False)', "False", SUMMED),
        ("main_grad left out", 'getattr(parameter, "main_grad", None)', "None", SUMMED),
        ("gradients not compared", "if _compared.get(group) != text:", "if False:", SUMMED),
        (
            "a bias without its mark left out",
            "or id(parameter) in biases",
            "",
            "test_sequence_parallel.py -k without_its_mark",
        ),
        (
            "missing gradient not written back",
            "gradient = parameter.grad = torch.zeros_like(parameter)",
            "gradient = torch.zeros_like(parameter)",
            SUMMED,
        ),
    ],
    "tpffn_triton/module.py": [
        ("mark lost by from_dense", "layer._mark_replicated()", "pass", MARK),
        ("mark lost by a copy", "twin._mark_replicated()", "pass", MARK),
    ],
    "tpffn_triton/transforms.py": [
        (
            "tangent of a slice",
            "x, dx = (None if t is None else all_gather(t.contiguous(), call.group) for t in (x, dx))",
            "x = all_gather(x.contiguous(), call.group)",
            "test_sequence_parallel.py -k pytorchs_modes",
        ),
    ],
    "bench/ring.py": [
        (
            "textbook ring one round short",
            "    for step in range(size - 1):\n        own",
            "    for step in range(size - 2):\n        own",
            RING,
        ),
        ("ring that replaces instead of adding", "own += received", "own.copy_(received)", RING),
        (
            "ring that sends the same chunk in every round",
            "_exchange(chunks[(rank - step) % size], received",
            "_exchange(chunks[rank], received",
            RING,
        ),
        ("ring that counts messages as elements", "counts.elements += sent.numel()", "counts.elements += 1", RING),
    ],
    "bench/network.py": [
        (
            "bytes sent before the first reading",
            "last[column] - first[column]",
            "last[column]",
            "test_traffic_bench.py -k sent_between",
        ),
        ("retransmissions and bytes in another order", "_BYTES_SENT_AT = 200", "_BYTES_SENT_AT = 208", SOCKET),
        (
            "sockets of the first kind only",
            "socket.AF_INET, socket.AF_INET6",
            "socket.AF_INET6, socket.AF_INET6",
            SOCKET,
        ),
        (
            "a reading before the last acknowledgement",
            "if carried == last:",
            "if True:",
            "test_traffic_bench.py -k nothing_follows",
        ),
        ("the machine's own network", "if _namespace() == outside or", "if", NOT_NEW),
        (
            "a network that others have used",
            " or any(carried.bytes for carried in _interfaces().values())",
            "",
            NOT_NEW,
        ),
        ("root alone", '(["-n"], ["-r", "-n"])', '(["-n"],)', "test_traffic_bench.py -k user_namespace"),
    ],
    "bench/traffic_measure.py": [
        (
            "repeated calls not divided",
            'rank["payload"] / repeats',
            'rank["payload"]',
            "test_traffic_bench.py -k tcp_carries",
        ),
        (
            "packets of one repetition",
            "(wire_then.bytes - wire.bytes) / repeats",
            "wire_then.bytes - wire.bytes",
            "test_traffic_bench.py -k wire_carries",
        ),
        (
            "ranks that meet on the wire",
            '    store.exchange({"reading": "counters"})\n',
            "    torch.distributed.barrier()\n",
            "test_traffic_bench.py -k wire_carries",
        ),
        (
            "forward's collectives planned for both passes",
            "tuple(c for c in plan.collectives if c.pass_ == pass_)",
            'tuple(c for c in plan.collectives if c.pass_ == "forward")',
            "test_traffic_bench.py -k every_collective",
        ),
    ],
}
