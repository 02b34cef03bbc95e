"""How FusedMLP is built, called, frozen and put into megatron-core's specs; what it refuses; and what imports it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from megatron_ranks import Layer

pytestmark = pytest.mark.cpu_only
ROOT = Path(__file__).resolve().parents[1]
SWIGLU = Layer("silu", gated=True)
BOTH = ("linear_fc1.weight", "linear_fc2.weight")


@pytest.mark.parametrize(
    "function",
    [
        "contract_cases.is_built_in_every_form",
        "contract_cases.begins_as_megatrons_on_a_gpu",
        "contract_cases.refuses",
        "contract_cases.takes_the_models_group",
        "contract_cases.says_what_it_ignores",
        "contract_cases.ignores_what_is_for_experts",
        "contract_cases.keeps_what_save_says",
        "spec_cases.replaces_the_mlp_of_a_layer",
        "spec_cases.replaces_the_mlps_of_a_block",
        "spec_cases.brings_the_norm_back",
    ],
)
def test_it(on_megatron_ranks, function):
    on_megatron_ranks(4, f"megatron_{function}")


@pytest.mark.parametrize("need_x", [True, False])
@pytest.mark.parametrize("frozen", [BOTH[:1], BOTH[1:], BOTH, ("linear_fc2.bias",)])
@pytest.mark.parametrize("layer", [Layer(), SWIGLU._replace(sequence_parallel=True)], ids=str)
def test_frozen_parameters_get_no_gradient(on_megatron_ranks, layer, frozen, need_x):
    on_megatron_ranks(2, "megatron_contract_cases.trains_what_is_not_frozen", frozen, need_x, layer)


@pytest.mark.parametrize("frozen", [(), BOTH[:1]])
@pytest.mark.parametrize("main_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layer", [SWIGLU, Layer(dtype="bfloat16", sequence_parallel=True)], ids=str)
def test_weight_gradients_are_added_to_main_grads(on_megatron_ranks, layer, main_dtype, frozen):
    on_megatron_ranks(2, "megatron_contract_cases.adds_to_main_grads", layer, main_dtype, frozen)


def python(code: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


def test_the_package_imports_no_megatron():
    result = python("import sys, tpffn_triton; print([name for name in sys.modules if name.startswith('megatron')])")
    assert result.stdout.strip() == "[]", result.stderr


def test_without_megatron_the_error_says_what_to_install():
    blocker = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "megatron":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
import tpffn_triton.megatron
"""
    result = python(blocker)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: tpffn_triton.megatron needs megatron-core")
    assert "pip install 'tpffn-triton[megatron]'" in last
