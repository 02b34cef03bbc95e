"""Mistakes in tpffn_triton/ for mutants.py to make: file → (name, text, replacement, tests that must notice)."""

VALUES = "test_functional.py -k 'test_values_and_gradients and float32 and {}'"
RANKS = "test_distributed.py -k 'ranks_equal_the_unsharded_reference and 2- and float32-native and {}'"
AUTOCAST = "test_precision.py -k autocast"
SLICES = "test_sequence_parallel.py -k autocast_and_main_grad"
SECOND = "test_pytorch.py -k second_derivatives"
FAULTS = "test_faults.py -k 'clear_error and {}'"
IN_FLIGHT = "test_distributed.py -k in_flight"

MUTANTS = {
    "tpffn_triton/passes.py": [
        ("b2 added by every rank", "call.group.rank() > 0:", "call.group.rank() > 9:", RANKS.format("relu-")),
        (
            "gradients never compared",
            "agree_on_gradient(group, dy, not slices, need_x or gather_dy)",
            "pass",
            "test_agreement.py -k until_its_end",
        ),
        ("y a view", "torch.ops.aten._unsafe_view(y, x.shape)", "y.view(x.shape)", "test_pytorch.py -k in_place"),
        (
            "y not reduced",
            "wait(_start_sum(y, call))).to(dtype)",
            "y).to(dtype)",
            RANKS.format("relu-"),
        ),
        ("dx not reduced", "dx = _start_sum(dx, call)", "dx = dx", RANKS.format("relu-")),
        ("dx not waited for", "dx if group is None else wait(dx)", "dx", IN_FLIGHT),
        (
            "dx waited for at once",
            "dx = _start_sum(dx, call)",
            "dx = wait(_start_sum(dx, call))",
            IN_FLIGHT,
        ),
        (
            "recomputation with another activation",
            "as_vector(b1, dtype), activation, need_d_pre)",
            "as_vector(b1, dtype), activation.replace('gelu_tanh', 'gelu'), need_d_pre)",
            VALUES.format("gelu_tanh"),
        ),
        (
            "recomputation without b1",
            "as_vector(b1, dtype), activation, need_d_pre)",
            "None, activation, need_d_pre)",
            VALUES.format("silu"),
        ),
        (
            "main_grad of the other weight",
            "wanted.weights[which]",
            "wanted.weights[1 - which]",
            SLICES,
        ),
        (
            "gradient of a frozen weight computed",
            "    if need_w1:\n",
            "    if x is not None:\n",
            "test_functional.py -k frozen",
        ),
        (
            "weight gradient through autocast's dtype",
            "kernels.wgrad(dy, x, wanted.dtypes[1 + which])",
            "kernels.wgrad(dy, x).to(wanted.dtypes[1 + which])",
            SLICES,
        ),
        (
            "db2 through autocast's dtype",
            "kernels.column_sum(own_dy, wanted.dtypes[4])",
            "kernels.column_sum(own_dy)",
            SLICES,
        ),
        (
            "db1 through autocast's dtype",
            "kernels.column_sum(db_partial, wanted.dtypes[3])",
            "kernels.column_sum(db_partial, dtype)",
            SLICES,
        ),
    ],
    "tpffn_triton/functional.py": [
        (
            'pre_act kept although save="nothing"',
            'if save == "pre_act" and (need_d_pre or need_w2)',
            "if (need_d_pre or need_w2)",
            "test_pytorch.py -k saved_bytes",
        ),
        (
            "what to keep chosen by what a transform hides",
            " and not transforming():",
            ":",
            "test_pytorch.py -k leaves_that_need",
        ),
        (
            "agreement skipped",
            "agree(comparing, kind,",
            "(lambda *_: None)(comparing, kind,",
            "test_distributed.py -k 'nobody_hanging and bias'",
        ),
        (
            "rejection sent by a compiled call",
            "comparing = None if torch.compiler.is_compiling() else group",
            "comparing = group",
            "test_distributed.py -k compiled_call_with_wrong",
        ),
        (
            "what forward raises not reported",
            "reporting(inputs[5].group, forward, *inputs)",
            "forward(*inputs)",
            FAULTS.format("raises"),
        ),
        (
            "what backward raises not reported",
            "reporting(ctx.wanted.call.group, backward, ctx.wanted, dy, *saved)",
            "backward(ctx.wanted, dy, *saved)",
            FAULTS.format("raises"),
        ),
        ("second derivative allowed by autograd", "    @once_differentiable\n", "", SECOND),
    ],
    "tpffn_triton/transforms.py": [
        (
            "second derivative allowed by torch.func",
            'raise RuntimeError(f"{NO_SECOND_DERIVATIVES}: its derivatives are once_differentiable")',
            "return (None,) * 11",
            SECOND,
        ),
        (
            "derivative of the derivative forgotten by forward mode",
            'raise RuntimeError(f"{NO_SECOND_DERIVATIVES}: forward-mode AD of its derivatives")',
            "return (None,) * 5",
            SECOND,
        ),
        ("tangent differentiable", "_Once.apply(_tangent, ctx.wanted.call, ", "_tangent(ctx.wanted.call, ", SECOND),
        (
            "other tensors saved for backward than for forward mode",
            "ctx.save_for_backward(*inputs[:5])",
            "ctx.save_for_backward(*_, None)",
            "test_pytorch.py -k leaves_that_need",
        ),
        (
            "tangent of w2 forgotten",
            "dy = dy if dw2 is None else dy + F.linear(act, dw2)",
            "",
            "test_pytorch.py -k 'torch_func and jvp'",
        ),
        (
            "tangent not reduced",
            "dy = reduce_scatter(dy, call.group) if call.sequence_parallel else all_reduce(dy, call.group)",
            "pass",
            "test_distributed_pytorch.py -k transforms",
        ),
    ],
    "tpffn_triton/ops.py": [
        (
            "elements of a batch with the batch's strides",
            "return arg.select(dim, i).contiguous()",
            "return arg.select(dim, i)",
            "test_ops.py -k vmap",
        ),
        (
            "fake act of a gated activation as wide as pre_act",
            "N = width // halves(activation)",
            "N = width",
            "test_ops.py -k 'opcheck and gated'",
        ),
        (
            "operators not seen by a function mode",
            "        or torch._C._len_torch_function_stack()\n",
            "",
            "test_ops.py -k modes_see",
        ),
        (
            "operators not recorded by a dispatch mode",
            "        or torch._C._len_torch_dispatch_stack()\n",
            "",
            "test_pytorch.py -k test_flops",
        ),
        (
            "autocast inside of the functions behind the operators",
            "        or torch.is_autocast_enabled(kind)\n",
            "",
            AUTOCAST,
        ),
        (
            "autocast inside of an operator",
            'with torch.autocast("cpu", enabled=False):',
            'with torch.autocast("cpu", enabled=True):',
            "test_precision.py -k backward_inside_autocast",
        ),
    ],
    "tpffn_triton/sharding.py": [
        (
            "gate and up of a shard swapped",
            "return part.flatten(0, 1)",
            "return part.flip(0).flatten(0, 1)",
            "test_partitionings.py -k inverts",
        ),
        (
            "gated rows cut as one block",
            "count = halves(activation) if",
            "count = 1 if",
            "test_module.py -k shard",
        ),
        (
            "shards of w2 cut along rows",
            "return part.flatten(0, 1)",
            "return part.roll(1, 2).flatten(0, 1) if name == 'w2' else part.flatten(0, 1)",
            "test_partitionings.py -k inverts",
        ),
        (
            "shards of w2 joined in another order",
            "for t in parts], dim + 1)",
            "for t in parts[:: -1 if name == 'w2' else 1]], dim + 1)",
            "test_partitionings.py -k inverts",
        ),
    ],
    "tpffn_triton/native.py": [
        (
            "native d_gate and d_up swapped",
            "d_gate, d_up = d_pre.chunk(2, dim=1)",
            "d_up, d_gate = d_pre.chunk(2, dim=1)",
            VALUES.format("native and swiglu"),
        ),
        (
            "native derivative of relu2 without its factor",
            "F.relu(z).mul_(2).mul_(d)",
            "F.relu(z).mul_(d)",
            VALUES.format("native and relu2"),
        ),
        (
            "native derivative of erf's gelu for tanh's",
            'gelu_backward(d, z, approximate="tanh")',
            "gelu_backward(d, z)",
            VALUES.format("native and gelu_tanh"),
        ),
        (
            "native weight gradient through 16 bits",
            "F.linear(dy.t().to(dtype), x.t().to(dtype))",
            "F.linear(dy.t(), x.t()).to(dtype)",
            AUTOCAST,
        ),
    ],
    "tpffn_triton/module.py": [
        (
            "full weights depend on P",
            "nn.init.kaiming_uniform_(weight, a=math.sqrt(5))",
            "nn.init.kaiming_uniform_(weight, a=math.sqrt(5)); torch.rand(self.world_size)",
            "test_distributed.py -k same_seed",
        ),
        (
            "copies that copy the group",
            "memo |= {id(what): what for what in shared}",
            "",
            "test_distributed.py -k sub_mesh",
        ),
    ],
    "tpffn_triton/partitionings.py": [
        (
            "F not divisible by P accepted",
            "if sizes[name] % world_size:",
            "if False:",
            "test_bad_input.py -k sharding_rejects",
        ),
    ],
    "tpffn_triton/validation.py": [
        (
            "main_grad of any strides accepted",
            "            and main_grad.is_contiguous()\n",
            "",
            "test_precision.py -k main_grad_that_does_not_fit",
        ),
    ],
}
