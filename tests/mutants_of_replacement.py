"""Mistakes in what replaces others' MLPs for mutants.py to make: file → (name, text, replacement, tests)."""

WIRING = "test_mlp_wiring.py -k {}"
STYLE = "test_parallel_style.py -k {}"
SIDE = "test_parallel_style.py -k 'side_by_side and 2'"
PEFT = "test_peft.py -k {}"
HUGGINGFACE = "test_huggingface.py -k {}"

MUTANTS = {
    "tpffn_triton/mlp_twins.py": [
        (
            "twins compared with a tolerance that lets tanh pass for erf",
            "TOLERANCE = 1e-8",
            "TOLERANCE = 1e-2",
            WIRING.format("told_apart"),
        ),
        (
            "twins compared by the largest token alone",
            "error, size = ((t.detach().abs().amax(-1)) for t in (values - right, right))",
            "error, size = ((t.detach().abs().amax()) for t in (values - right, right))",
            WIRING.format("something_else"),
        ),
        (
            "twins not called on large values",
            "torch.logspace(-2, 6,",
            "torch.logspace(-2, 0,",
            WIRING.format("something_else"),
        ),
        (
            "gradients of twins not compared",
            "return len(results) == len(right) and all(map(same_values, results, right))",
            "return same_values(results[0], right[0])",
            WIRING.format("something_else"),
        ),
        (
            "tokens of one dim alone",
            "SMALL_H, SMALL_F, TOKENS = 6, 10, (16, 6)",
            "SMALL_H, SMALL_F, TOKENS = 6, 10, (96, 1)",
            WIRING.format("something_else"),
        ),
        (
            "hooks on parameters passed over",
            "if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:",
            "if False:",
            WIRING.format("lost"),
        ),
        (
            "the search calls somebody's hooks",
            "getattr(part, kind).clear()  # somebody's, who waits for real calls",
            "pass",
            WIRING.format("do_not_see"),
        ),
        (
            "hooks inside of a module passed over",
            "check_called(name, part, hooks=part is not module)",
            "check_called(name, part, hooks=False)",
            WIRING.format("lost"),
        ),
        (
            "a replaced forward passed over",
            'if "forward" in vars(module):',
            "if False:",
            WIRING.format("lost"),
        ),
        (
            "quantized weights taken",
            "if type(parameter) is not nn.Parameter or parameter.dtype not in FFN_DTYPES:",
            "if False:",
            WIRING.format("lost"),
        ),
        (
            "parameters of others passed over",
            "elif any(getattr(part, tensor) is not None for tensor in own):",
            "elif False:",
            WIRING.format("lost"),
        ),
        (
            "looking at an MLP draws from the generator",
            "torch.random.fork_rng(devices=[]),",
            "torch.random.fork_rng(devices=[], enabled=False),",
            WIRING.format("untouched"),
        ),
    ],
    "tpffn_triton/mlp_wiring.py": [
        (
            "dropout inside of an MLP lost",
            "if inside := [",
            "if inside := [] and [",
            WIRING.format("lost"),
        ),
        (
            "a dropout used twice taken for one behind",
            "if len(calls) == 1 and torch.equal(calls[0], right)",
            "if calls and torch.equal(calls[-1], right)",
            WIRING.format("lost"),
        ),
        (
            "dropout behind an MLP lost",
            "_dropouts_behind(twin, x), hidden_size",
            "(), hidden_size",
            WIRING.format("dropout_behind"),
        ),
        (
            "dropout by a function lost",
            "if not torch.equal(values_of(twin.train(), x), right):",
            "if False:",
            WIRING.format("lost"),
        ),
        (
            "any activation is the one asked for",
            "if activation not in (None, found.activation):",
            "if False:",
            STYLE.format("something_else"),
        ),
        (
            "a bias on gate alone taken",
            "and len(biases) == 1:",
            "and biases:",
            WIRING.format("lost"),
        ),
    ],
    "tpffn_triton/mlp_halves.py": [
        (
            "what lies between halves lost",
            "if not (len(returned) == len(given) == 1 and given[0] is returned[0]):",
            "if False:",
            WIRING.format("halves"),
        ),
        (
            "halves looked at outside of training alone",
            "for training in (True, False):",
            "for training in (False,):",
            WIRING.format("halves"),
        ),
        (
            "halves of one token taken",
            "if not isinstance(y, Tensor) or y.shape != x.shape or given[0].shape[:-1] != x.shape[:-1]:",
            "if False:",
            WIRING.format("halves"),
        ),
        (
            "dropout inside of the first half lost",
            "if not torch.equal(values_of(twin.intermediate.train(), x), values_of(twin.intermediate.eval(), x)):",
            "if False:",
            WIRING.format("halves"),
        ),
        (
            "norms behind fc2 as they are, ones and zeros",
            "copies[id(parameter)] = nn.Parameter(values, requires_grad=False)",
            "copies[id(parameter)] = nn.Parameter(values * 0, requires_grad=False)",
            WIRING.format("halves"),
        ),
    ],
    "tpffn_triton/tensor_parallel_mlp.py": [
        (
            "up above gate",
            "self._joined(*fc1)",
            "self._joined(*fc1[::-1])",
            STYLE.format("'equals and swiglu and bfloat16 and 2'"),
        ),
        (
            "up's bias above gate's",
            "torch.cat([gate_bias, up_bias])",
            "torch.cat([up_bias, gate_bias])",
            STYLE.format("'equals and swiglu and bfloat16 and 2'"),
        ),
        (
            "the gradient of up is gate's",
            "return gate, up\n",
            "return gate, gate\n",
            STYLE.format("'equals and swiglu and bfloat16 and 2'"),
        ),
        (
            "gate and up taken for adjacent",
            "and up.storage_offset() == gate.storage_offset() + gate.numel()",
            "",
            "test_replaced_device.py -k other_order",
        ),
        (
            "gate and up copied at each call",
            "as_it_is = not torch.compiler.is_compiling()",
            "as_it_is = False and not torch.compiler.is_compiling()",
            SIDE,
        ),
        (
            "gate and up apart after to()",
            "        self._lay_side_by_side()  # to() and its like move each by itself\n",
            "",
            SIDE,
        ),
        (
            "ranks do not compare their parameters",
            "return f\"{wiring} of {'; '.join(parameters)}\"",
            "return str(wiring)",
            STYLE.format("rank_with"),
        ),
        (
            "a copy without its gradients",
            "copied.grad = None if grad is None else",
            "copied.grad = None if True else",
            STYLE.format("copies"),
        ),
        (
            "reset_parameters draws too widely",
            "nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))",
            "nn.init.kaiming_uniform_(self.weight, a=1)",
            STYLE.format("reset"),
        ),
        (
            "moving a weight drops its gradient",
            "parameter.grad = weight.grad\n",
            "pass\n",
            STYLE.format("gradients_move"),
        ),
        (
            "the bias of fc2 has one rank's part of its gradient",
            "b2 = copy_to_tp_region(b2, fused.tp_group)",
            "b2 = b2",
            STYLE.format("'slices and gelu'"),
        ),
        (
            "dropout behind fc2 not called",
            "for name in wiring.dropouts:",
            "for name in ():",
            STYLE.format("dropout"),
        ),
        (
            "fc2's bias cut",
            "(Shard(1), Replicate())",
            "(Shard(1), Shard(0))",
            STYLE.format("'placed and gelu and 2'"),
        ),
        (
            "Conv1D cut along the wrong dim",
            "Shard(1 - placement.dim) if turned",
            "Shard(placement.dim) if turned",
            STYLE.format("conv1d"),
        ),
        (
            "every rank's own values count",
            "src_data_rank=src_data_rank)\n            if turned",
            "src_data_rank=None)\n            if turned",
            STYLE.format("'placed and gelu and 2'"),
        ),
        (
            "frozen parameters thaw",
            "parameter = nn.Parameter(full, parameter.requires_grad)",
            "parameter = nn.Parameter(full)",
            STYLE.format("frozen"),
        ),
        (
            "linears say the full sizes",
            "out_features //= 1 if mesh is None else mesh.size()",
            "out_features //= 1",
            STYLE.format("sizes"),
        ),
        (
            "wrappers of linears passed by",
            "_local(self.get_submodule(name)(x))",
            "_local((self.get_submodule(name).weight, self.get_submodule(name).bias))",
            PEFT.format("replaced_mlp_can"),
        ),
    ],
    "tpffn_triton/module.py": [
        (
            "wrappers of linear_fc1 passed by",
            "w1, b1 = self.linear_fc1(x)",
            "w1, b1 = self.linear_fc1.weight, self.linear_fc1.bias",
            PEFT.format("'target_parameters and native'"),
        ),
    ],
    "tpffn_triton/parallel_style.py": [
        (
            "a rank that refuses an MLP does not say so",
            "reject(group, error)  # the others are about to communicate",
            "pass",
            STYLE.format("rank_with"),
        ),
        (
            "ranks do not compare their MLPs",
            'compare(group, {"MLP": f"{describe(module, wiring)}, by {self}"})',
            "compare(group, {})",
            STYLE.format("rank_with"),
        ),
        (
            "DTensors taken as they are",
            "x.redistribute(mesh, [self.layout]).to_local() if",
            "x.to_local() if",
            STYLE.format("dtensors"),
        ),
        (
            "features cut",
            "if isinstance(self.layout, Shard) and",
            "if False and",
            STYLE.format("cutting"),
        ),
        (
            "two layouts of which one is ignored",
            "if layouts[0] != layouts[1] or",
            "if",
            STYLE.format("refused_at_once"),
        ),
    ],
    "tpffn_triton/huggingface.py": [
        (
            "shared parameters go apart",
            "if uses[id(part)] > 1]",
            "if uses[id(part)] > 2]",
            HUGGINGFACE.format("shared"),
        ),
        (
            "an F that P does not divide is not said",
            "check_sizes(wiring.hidden_size, wiring.ffn_hidden_size, world_size)",
            "check_sizes(wiring.hidden_size, wiring.ffn_hidden_size, 1)",
            HUGGINGFACE.format("divide"),
        ),
        (
            "what is left is not said",
            "left.append(Left(name, type(module).__name__, str(error)))",
            "pass",
            HUGGINGFACE.format("'left_and_said and T5'"),
        ),
        (
            "MLPs inside of what is left are passed over",
            "left.append(Left(name, type(module).__name__, str(error)))\n",
            "left.append(Left(name, type(module).__name__, str(error)))\n                inside = {}\n",
            HUGGINGFACE.format("mixture"),
        ),
    ],
}
