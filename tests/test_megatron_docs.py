"""What docs/megatron.md shows is true: its Python runs as written, its tables and numbers are today's."""

import json
import re
from types import SimpleNamespace

import pytest
import torch.nn.functional as F
from torchrun import ROOT, run_block

from tpffn_triton.megatron_options import activation_of, check_options

pytestmark = pytest.mark.cpu_only
PAGE = (ROOT / "docs" / "megatron.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
# As the page has it for a machine without a GPU.
PROLOGUE = "import megatron_without_gpu\nmegatron_without_gpu.run_on_cpu()\n"
MODEL = {"activation_func": F.gelu, "gated_linear_unit": False, "bias_activation_fusion": False}


# Prints what each MLP keeps for backward beside its input and its parameters, in multiples of [M, F/P].
COUNT_SAVED_TENSORS = """
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from tpffn_triton.megatron import FusedMLP

M, H, FFN = 6, 16, 32
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel(1)
tensor_parallel.model_parallel_cuda_manual_seed(1)
for work, function, fusion in (
    ("gelu", F.gelu, False), ("gelu", F.gelu, True), ("swiglu", F.silu, False), ("swiglu, fused", F.silu, True)
):
    config = TransformerConfig(
        num_layers=1, hidden_size=H, ffn_hidden_size=FFN, num_attention_heads=2, use_cpu_initialization=True,
        activation_func=function, gated_linear_unit=work != "gelu", bias_activation_fusion=fusion,
    )
    for mlp, options in ((MLP, {}), (FusedMLP, {}), (FusedMLP, {"save": "nothing"})):
        layer = mlp(config, MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear), **options)
        x = torch.randn(M, 1, H, requires_grad=True)
        known = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
        saved = {}

        def pack(t):
            saved[t.untyped_storage().data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = layer(x)
        kept = sum(t.numel() for address, t in saved.items() if address not in known)
        print("kept", work, mlp.__name__, *options.values(), kept / (M * FFN), sep="|")
"""


def section(title: str) -> str:
    (text,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    return text


@pytest.mark.slow
def test_the_first_example_runs_as_written(tmp_path):
    pytest.importorskip("megatron.core")
    output = run_block(BLOCKS[0], tmp_path, PROLOGUE)
    # The ranks share a pipe and may write into each other's lines.
    assert output.count("FusedMLP") == output.count("torch.Size([128, 64])") == 2


@pytest.mark.slow
def test_the_second_example_runs_and_memory_is_that_of_the_table(tmp_path):
    """One process for both: most of the time is Megatron's import."""
    pytest.importorskip("megatron.core")
    (block,) = BLOCKS[1:]
    assert "torchrun" not in block
    shown = "print(spec.submodules.mlp.module.__name__, spec.submodules.mlp.params)\n"
    output = run_block(block + shown + COUNT_SAVED_TENSORS, tmp_path, PROLOGUE)
    assert re.search("^FusedMLP .*'save': 'nothing'", output, re.MULTILINE)
    rows = {"gelu": "gelu", "swiglu": "swiglu", "swiglu, fused": "swiglu, `bias_activation_fusion`"}
    kept = [line.split("|")[1:] for line in output.splitlines() if line.startswith("kept|")]
    assert len(kept) == 12
    for (work, *_, megatron), (*_, fused), (*_, nothing) in zip(kept[::3], kept[1::3], kept[2::3], strict=True):
        assert float(nothing) == 0
        cells = [f"{float(number):g} × [M, F/P]" for number in (megatron, fused)]
        assert f"| {rows[work]} | {' | '.join(cells)} | 0 |" in PAGE, kept


def test_activations_are_those_of_the_table():
    rows = re.findall(r"^\| `F\.(\w+)` \| `(\w+)` \| `(\w+)` \| `(\w+)` \|$", section("Which activation"), re.MULTILINE)
    assert len(rows) == 8
    for function, gated, fusion, computed in rows:
        config = SimpleNamespace(
            activation_func=getattr(F, function),
            gated_linear_unit=gated == "True",
            bias_activation_fusion=fusion == "True",
        )
        assert activation_of(config) == computed


def test_options_of_the_table_are_refused():
    rows, _ = section("What is refused").split("| another `activation_func`")
    names = [
        name for cell in re.findall(r"^\| (`[^|]*) \|", rows, re.MULTILINE) for name in re.findall(r"`(\w+)`", cell)
    ]
    assert {"fp8", "cpu_offloading", "glu_linear_offset"} <= set(names)
    check_options(SimpleNamespace(**MODEL | {"gated_linear_unit": True}))
    for name in names:
        with pytest.raises(ValueError, match=f"{name}=1.5"):
            check_options(SimpleNamespace(**MODEL | {"gated_linear_unit": True, name: 1.5}))


def test_numbers_are_the_files():
    text = section("Example")
    (path,) = set(re.findall(r"\]\((\S*\.json)\)", text))
    written = json.loads((ROOT / "docs" / path).read_text())
    about, found, steps = written["about"], written["summary"], written["steps"]
    for row, name, form in (
        ("loss of the first batch", "first_loss", ".6f"),
        ("loss of the last batch", "last_loss", ".6f"),
        ("median time of a step", "ms", ".0f"),
    ):
        cells = [f"{found[f'{name}_{mlp}']:{form}}" + " ms" * (name == "ms") for mlp in ("megatron", "fused")]
        assert f"| {row} | {' | '.join(cells)} |" in text
    assert f"Largest difference in {len(steps)} steps: {found['largest_difference']:.1e}" in text
    assert found["largest_difference"] == max(abs(row["loss_megatron"] - row["loss_fused"]) for row in steps) < 1e-5
    (command,) = re.findall(r"^    torchrun .*(train_gpt_megatron\.py .*)$", text, re.MULTILINE)
    assert about["command"].startswith(command)
    assert f"On {about['cores']} cores of an Intel Xeon" in text
    assert "Intel(R) Xeon(R)" in about["device"]
    assert f"TP {about['tp']} × DP {about['ranks'] // about['tp']}" in text
    assert f"megatron-core {about['megatron-core']} " in text


def test_links_exist():
    for link in re.findall(r"\]\(([^)#]+)", PAGE):
        assert (ROOT / "docs" / link).exists(), link
