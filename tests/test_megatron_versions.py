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
TRAININGS = [
    (2, Training(GELU._replace(sequence_parallel=True), gradient_accumulation_fusion=True)),
    (1, Training(SWIGLU, recompute="mlp")),
]


@pytest.mark.parametrize("version", VERSIONS or [pytest.param("", marks=pytest.mark.skip(reason="TPFFN_MEGATRON"))])
def test_another_version(version, tmp_path):
    """The essence of the other tests, on two ranks. In one test: they take seconds to start."""
    pytest.importorskip("psutil")
    folder = Path(FOLDER, version).resolve()
    pool = Ranks(2)
    run = functools.partial(on_ranks, pool, folder=str(folder))
    try:
        found, file = run(2, "megatron_contract_cases.imported")[0]
        assert Path(file).is_relative_to(folder)
        assert found.startswith(version) or not version[0].isdigit()
        for sequence_parallel in (False, True):
            for layer in (GELU, SWIGLU):
                own = layer._replace(sequence_parallel=sequence_parallel)
                run(2, "megatron_cases.equals_megatrons", "FusedMLP", own)
        for tp, case in TRAININGS:
            losses = run(tp, "megatron_training_cases.trains_as_megatrons", "FusedMLP", case)
            assert all(rank[-1] < rank[0] - 0.1 for rank in losses), losses
        for function in ("replaces_the_mlp_of_a_layer", "replaces_the_mlps_of_a_block"):
            run(2, f"megatron_spec_cases.{function}")
        if run(1, "megatron_checkpoint_cases.can_save")[0]:  # 0.12's writer calls an older torch
            for classes in (("MLP", "FusedMLP"), ("FusedMLP", "MLP")):
                path = tmp_path / classes[0]
                path.mkdir()
                check(run, path, "swiglu", *classes, 1, 2)
    finally:
        pool.close()
