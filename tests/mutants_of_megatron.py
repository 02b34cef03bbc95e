"""Mistakes in the Megatron adapter for mutants.py to make: file → (name, text, replacement, tests).

Larger ones, which need more than a line, are in broken_megatron.py.
"""

EQUAL = "test_megatron_mlp.py -k 'equals and relu2'"
CONTRACT = "test_megatron_contract.py -k {}"
OPTIONS = "test_megatron_options.py -k {}"

MUTANTS = {
    "tpffn_triton/megatron_mlp.py": [
        (
            "bias returned as the parameter",
            "b2.view_as(b2)",
            "b2",
            "test_megatron_training.py -k 'TP1 and mlp'",
        ),
        (
            "Megatron's group not passed on",
            "tp_group=group,",
            "tp_group=None,",
            EQUAL,
        ),
        (
            "modules not called",
            "w1, b1 = self.linear_fc1()\n",
            "w1, b1 = self.linear_fc1.weight, self.linear_fc1.bias\n",
            "test_megatron_broken.py -k without",
        ),
        (
            "sequence_parallel of the config",
            "sequence_parallel=self._sequence_parallel(group),",
            "sequence_parallel=self.config.sequence_parallel,",
            "test_megatron_mlp.py -k switched",
        ),
        ("linears may disagree", "if fc1 != fc2 and", "if not fc1 and fc1 != fc1 and", CONTRACT.format("refuses")),
        (
            "save not passed on",
            "save=self.save,\n            grad",
            'save="pre_act",\n            grad',
            CONTRACT.format("keeps_what"),
        ),
        ("tp_group overruled", "default = tp_group or ", "default = ", CONTRACT.format("every_form")),
        (
            "pg_collection ignored",
            'tp_group or getattr(kwargs.get("pg_collection"), "tp", None)',
            "tp_group",
            CONTRACT.format("every_form"),
        ),
        (
            "another group unseen",
            "group.size() != size",
            "size == 0",
            CONTRACT.format("models_group"),
        ),
        ("a typo unseen", "if unknown := kwargs.keys()", "if unknown := set()", CONTRACT.format("ignores")),
        ("an expert", "if is_expert:\n", "if is_expert is None:\n", CONTRACT.format("refuses")),
        ("another size", "if given not in (None, own):", "if given == 0:", CONTRACT.format("refuses")),
        (
            "scale ignored",
            "if per_token_scale is not None:",
            "if per_token_scale is False:",
            CONTRACT.format("refuses"),
        ),
        (
            "linears lost",
            "if given not in (None, own, held, *others):",
            "if given is False:",
            CONTRACT.format("refuses"),
        ),
        (
            "APEX asked for",
            "plain.gradient_accumulation_fusion = False",
            "plain.gradient_accumulation_fusion |= False",
            CONTRACT.format("main_grads"),
        ),
        (
            "main_grads of any dtype",
            "found != torch.float32",
            "found is None",
            CONTRACT.format("main_grads"),
        ),
        (
            "main_grad of a frozen weight",
            "if weight.requires_grad and found",
            "if found",
            CONTRACT.format("main_grads"),
        ),
        (
            "main_grad without gradients",
            "gradient_accumulation_fusion and torch.is_grad_enabled())",
            "gradient_accumulation_fusion)",
            CONTRACT.format("main_grads"),
        ),
        (
            "metadata of a checkpoint dropped",
            "ensure(None if metadata is None else dict(metadata))",
            "ensure(None)",
            "test_megatron_checkpoints.py -k names_of_their_own",
        ),
    ],
    "tpffn_triton/megatron.py": [
        (
            "norm lost",
            'changes |= {"pre_mlp_layernorm": transformer_engine.TENorm, ',
            "changes |= {",
            CONTRACT.format("norm"),
        ),
        (
            "norm renamed in checkpoints",
            '"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"',
            '"pre_mlp_layernorm.": "mlp.linear_fc1.norm_"',
            CONTRACT.format("norm"),
        ),
        ("mixtures replaced", "mlp is not None and mlp in", "mlp is not None or mlp in", CONTRACT.format("block")),
        (
            "given spec changed",
            "return replace(spec, submodules=replace(before, **changes))",
            "vars(before).update(changes)\n    return spec",
            CONTRACT.format("replaces_the_mlp_of_a_layer"),
        ),
    ],
    "tpffn_triton/megatron_options.py": [
        ("erf under bias_activation_fusion", 'name = "gelu_tanh" if', 'name = "gelu" if', OPTIONS.format("fused_gelu")),
        ("erf and tanh alike", "rtol=1e-8, atol=1e-8", "rtol=1e-3, atol=1e-3", OPTIONS.format("by_its_values")),
        ("plain where gated", "return _GATED[name] if gated else name", "return name", OPTIONS.format("gated")),
        ("an option forgotten", '    "cpu_offloading",\n', "", OPTIONS.format("by_name")),
        (
            "gated options of plain MLPs",
            "if config.gated_linear_unit else ()",
            "if config is not None else ()",
            OPTIONS.format("gated_mlps"),
        ),
        (
            "fusion of any function",
            "if function is not F.gelu and not",
            "if function is None and not",
            OPTIONS.format("cannot_fuse"),
        ),
    ],
}
