"""Mistakes in the four partitionings, for mutants.py: file → (name, text, replacement, tests that notice)."""

INTEGERS = "test_partitioned.py -k 'small_integers and {} and native'"
BIASES = "test_partitioned.py -k 'one_hot and {}'"
SHAPES = "test_partitioned.py -k any_shape"
BEHIND = "test_partitioned_collectives.py -k 'in_flight and {}'"
SAVED = "test_partitioned_collectives.py -k 'plan_is_what_runs and swiglu and {}'"
HANGING = "test_partitioned_bad_input.py -k 'hanging and {}'"
FAILING = "test_partitioned_bad_input.py -k 'on_its_way and {}'"

MUTANTS = {
    "tpffn_triton/partitioned.py": [
        ("b2 added on every rank", "call.group.rank() > 0:", "call.group.rank() > 9:", BIASES.format("row_row")),
        (
            "own features of b2 added on one rank",
            'if p.linear2 == "row" and call.group is not None',
            "if call.group is not None",
            BIASES.format("column_column"),
        ),
        (
            "b1 added to each rank's partial sums",
            "pre_act += b1",
            "pre_act += b1 * call.group.size()",
            BIASES.format("row_column"),
        ),
        (
            "activation before the sum",
            "pre_act = call.start(kind, call.by_rank(kind, kernels.linear(x, w1, None), count))",
            "pre_act = kernels.linear(x, w1, None).relu_()\n"
            "        pre_act = call.start(kind, call.by_rank(kind, pre_act, count))",
            INTEGERS.format("row_row"),
        ),
        (
            "gate and up scattered as one block",
            "kernels.linear(x, w1, None), count))",
            "kernels.linear(x, w1, None)))",
            INTEGERS.format("row_row"),
        ),
        (
            "d_pre's gate and up gathered as one block",
            "d_pre = call.finish(first, d_pre, halves(activation))",
            "d_pre = call.finish(first, d_pre)",
            INTEGERS.format("row_row"),
        ),
        (
            "features gathered in another order of ranks",
            "parts.permute(1, 2, 0, 3)",
            "parts.permute(1, 2, 0, 3).flip(2)",
            INTEGERS.format("column_column"),
        ),
        (
            "features scattered in another order of ranks",
            "parts.permute(2, 0, 1, 3)",
            "parts.permute(2, 0, 1, 3).flip(0)",
            INTEGERS.format("column_column"),
        ),
        (
            "features of another rank taken for its own",
            "[self.group.rank()].clone",
            "[self.group.rank() - 1].clone",
            INTEGERS.format("row_column"),
        ),
        (
            "terms of d_hidden not added",
            "d_hidden = call.start(first, call",
            'd_hidden = call.start(first if first == "reduce_scatter" else None, call',
            INTEGERS.format("row_column"),
        ),
        (
            "dw2 from this rank's features of the hidden",
            "gathered = None if p.hidden.forward is None else hidden",
            "gathered = None if p.hidden.forward is None else call.own_features(hidden).repeat(1, call.group.size())",
            INTEGERS.format("column_column"),
        ),
        (
            "hidden kept that can be computed",
            "gathered = None if p.hidden.forward is None else hidden",
            "gathered = hidden",
            SAVED.format("row_column"),
        ),
        (
            "all of x kept alive by a part",
            "[self.group.rank()].clone(memory_format=torch.contiguous_format)",
            "[self.group.rank()]",
            SAVED.format("row_row"),
        ),
        (
            "first exchange waited for at once",
            "        hidden = native.activate(pre_act, activation) if",
            "        wait(d_hidden)\n        hidden = native.activate(pre_act, activation) if",
            BEHIND.format("column_column"),
        ),
        (
            "exchange of dx waited for at once",
            "    dw1 = kernels.wgrad(",
            "    wait(dx)\n    dw1 = kernels.wgrad(",
            BEHIND.format("row_row"),
        ),
        ("no tokens", "features // blocks // ranks)", "-1)", SHAPES),
        (
            "single features not copied",
            ".contiguous().view(rows // ranks",
            ".reshape(rows // ranks",
            "test_partitioned.py -k 'one_feature and triton'",
        ),
        (
            "ranks that record beside ranks that do not",
            '(*options, "gradients" if recorded else "no gradients")',
            "options",
            HANGING.format("row_row and recorded"),
        ),
        (
            "weights kept in autocast's dtype",
            "kept, weights = x, (w1, w2)",
            "kept, weights = x, (as_rows(w1, dtype), as_rows(w2, dtype))",
            "test_partitioned.py -k 'like_any_operator and row_row'",
        ),
        (
            "y is a view",
            "torch.ops.aten._unsafe_view(y, ctx.shape)",
            "y.view(ctx.shape)",
            "test_partitioned.py -k 'like_any_operator and row_row'",
        ),
        ("partitioning not compared", "(activation, p.name, ", "(activation, ", HANGING.format("column_row and name")),
        (
            "whole b1 not compared",
            "if dim is None))",
            'if name == "b2"))',
            "test_partitioned_bad_input.py -k 'biases_that_differ and row_column'",
        ),
        (
            "rejected call not told",
            "            reject(group, error)\n",
            "            pass\n",
            HANGING.format("row_row and activation"),
        ),
        (
            "failure in forward not told",
            "reporting(ctx.call.group, _forward, *inputs)",
            "_forward(*inputs)",
            FAILING.format("activate"),
        ),
        (
            "failure in backward not told",
            "reporting(ctx.call.group, _backward, dy,",
            "_backward(dy,",
            FAILING.format("dact"),
        ),
    ],
    "tpffn_triton/partitionings.py": [
        (
            "d_pre of own features alone for a row-parallel Linear1",
            'REDUCE_SCATTER = Region("reduce_scatter", "all_gather")',
            'REDUCE_SCATTER = Region("reduce_scatter", None)',
            "test_partitionings.py -k linears_need",
        ),
        (
            "gradient of a gathered hidden cut instead of summed",
            'GATHER = Region("all_gather", "reduce_scatter")',
            'GATHER = Region("all_gather", None)',
            "test_partitionings.py -k linears_need",
        ),
        (
            "gradient of a whole hidden not summed",
            "pre_act=REDUCE, hidden=COPY",
            "pre_act=REDUCE, hidden=KEEP",
            "test_partitionings.py -k linears_need",
        ),
        (
            "another table in the docstring",
            "column_column     COPY     KEEP              GATHER    JOIN",
            "column_column     COPY     GATHER            KEEP      JOIN",
            "test_partitionings.py -k docstring",
        ),
        (
            "b1 whole where its features are scattered",
            "0 if column1 or self.pre_act == REDUCE_SCATTER else None",
            "0 if column1 else None",
            "test_partitionings.py -k this_ranks_features",
        ),
        (
            "b2 of a column-parallel Linear2 whole",
            '"b2": 0 if column2 else None',
            '"b2": None',
            "test_partitionings.py -k this_ranks_features",
        ),
        (
            "H not divisible by P accepted",
            'by_hidden = self.linear1 == "row" or self.linear2 == "column"',
            'by_hidden = self.linear2 == "column"',
            "test_partitionings.py -k multiples_of_p",
        ),
    ],
    "tpffn_triton/sharding.py": [
        (
            "features of another rank",
            ".chunk(world_size, dim + 1)[rank]",
            ".chunk(world_size, dim + 1)[rank - 1]",
            "test_partitionings.py -k this_ranks_features",
        ),
        (
            "replicated pieces not compared",
            "enumerate(parts if first is not None else ())",
            "enumerate(())",
            "test_partitionings.py -k replicated_pieces",
        ),
        (
            "shards joined as another partitioning's",
            "    check_partitioned_shapes(None, w1, w2, b1, b2, activation, p, len(shards))\n",
            "",
            "test_partitionings.py -k of_another_partitioning",
        ),
    ],
    "tpffn_triton/validation.py": [
        (
            "x of another width beside shards that fit",
            "(x is None or x.shape[-1] == H) and all",
            "all",
            HANGING.format("column_row and hidden"),
        ),
    ],
}
