"""FusedMLP with other versions of megatron-core: TPFFN_MEGATRON names a folder with one folder for each.

pip install --no-deps --target megatrons/0.12.3 megatron-core==0.12.3
TPFFN_MEGATRON=megatrons python -m pytest tests/test_megatron_versions.py
"""

import functools
import os
from pathlib import Path

import pytest
from megatron_ranks import Layer, Training, on_ranks
from rank_pool import Ranks
from test_megatron_checkpoints import check

pytestmark = pytest.mark.cpu_only
FOLDER = os.environ.get("TPFFN_MEGATRON")
VERSIONS = [] if FOLDER is None else sorted(path.name for path in Path(FOLDER).iterdir() if path.is_dir())
GELU, SWIGLU = Layer("gelu", fused=True), Layer("silu", gated=True)


@pytest.fixture(scope="module", params=VERSIONS or [pytest.param("", marks=pytest.mark.skip(reason="TPFFN_MEGATRON"))])
def on_version(request):
    """Return a function as on_megatron_ranks, on two ranks that import another version."""
    pytest.importorskip("psutil")
    folder = Path(FOLDER, request.param).resolve()
    pool = Ranks(2)

    run = functools.partial(on_ranks, pool, folder=str(folder))

    try:
        version, file = run(2, "megatron_contract_cases.imported")[0]
        assert Path(file).is_relative_to(folder)
        assert version.startswith(request.param) or not request.param[0].isdigit()
        yield run
    finally:
        pool.close()


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["TP", "SP"])
@pytest.mark.parametrize("layer", [GELU, SWIGLU], ids=str)
def test_it_equals_megatrons_mlp(on_version, layer, sequence_parallel):
    layer = layer._replace(sequence_parallel=sequence_parallel)
    on_version(2, "megatron_cases.equals_megatrons", "FusedMLP", layer)


@pytest.mark.parametrize(
    ("tp", "case"),
    [
        (2, Training(GELU._replace(sequence_parallel=True), gradient_accumulation_fusion=True)),
        (1, Training(SWIGLU, recompute="mlp")),
    ],
    ids=str,
)
def test_it_trains_as_megatrons_mlp(on_version, tp, case):
    losses = on_version(tp, "megatron_training_cases.trains_as_megatrons", "FusedMLP", case)
    assert all(rank[-1] < rank[0] - 0.1 for rank in losses), losses


@pytest.mark.parametrize(("from_class", "to_class"), [("MLP", "FusedMLP"), ("FusedMLP", "MLP")])
def test_checkpoints_survive(on_version, tmp_path, from_class, to_class):
    if not on_version(1, "megatron_checkpoint_cases.can_save")[0]:
        pytest.skip("this version's writer calls an older torch")
    check(on_version, tmp_path, "swiglu", from_class, to_class, 1, 2)


@pytest.mark.parametrize("function", ["replaces_the_mlp_of_a_layer", "replaces_the_mlps_of_a_block"])
def test_specs(on_version, function):
    on_version(2, f"megatron_contract_cases.{function}")
