"""tp.explain says what is launched: compared with the launches themselves."""

import json

import pytest
import torch
import torch.distributed as dist
from ffn_cases import draw, ours
from rank_pool import use

import tpffn_triton as tp
from tpffn_triton import interpreter
from tpffn_triton.kernels._launch import Launch

pytestmark = pytest.mark.cpu_only  # interpreted kernels use the rows of sm_90
KERNEL_OF = {"linear": "matmul", "dgrad": "matmul", "gated_ffn": "ffn"}


def launched(*args, **options) -> list[tuple[str, int, int]]:
    """Return (kernel, programs, warps) of each launch of forward and backward."""
    found = []
    launch = Launch.__call__

    def recorded(self, *tensors):
        programs = self._grid[0] * self._grid[1] * self._grid[2]
        found.append((self._kernel.fn.__name__, programs, self._options.get("num_warps")))
        return launch(self, *tensors)

    Launch.__call__ = recorded
    try:
        ours(*args, **options)
    finally:
        Launch.__call__ = launch
    return found


def explained(lead, H, F, activation, **options) -> list[tuple[str, int, int]]:
    """Return the same of an explanation."""
    rows = tp.explain((*lead, H), F, activation=activation, arch="sm_90", **options).launches
    gated = "gated_" if activation in ("geglu", "swiglu") else ""
    names = [f"{gated}{r.kernel}" if r.kernel in ("linear_act", "linear_dact") else r.kernel for r in rows]
    return [
        (f"{KERNEL_OF.get(name, name)}_kernel", r.programs, r.config and r.config.num_warps)
        for name, r in zip(names, rows, strict=True)
    ]


# Tokens; aligned and odd sizes; 300 rows of dy are summed in two passes.
SIZES = [((40,), 64, 96), ((2, 20), 45, 71), ((300,), 64, 128)]


@pytest.mark.parametrize("save", ["pre_act", "nothing"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize(("lead", "H", "F"), SIZES[:2])
def test_one_rank(lead, H, F, activation, bias, save):
    problem = draw(lead, H, F, activation=activation, dtype=torch.bfloat16, bias=bias)
    assert explained(lead, H, F, activation, bias=bias, save=save) == launched(problem, save=save)


@pytest.mark.usefixtures("in_several_launches")
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize(("lead", "H", "F"), SIZES)
def test_one_rank_with_launches_apart(lead, H, F, activation):
    expected = launched(draw(lead, H, F, activation=activation, dtype=torch.bfloat16))
    assert len(expected) >= 8
    assert explained(lead, H, F, activation) == expected


def launches_of_ranks(rank, world_size, lead, H, F, options):
    use("triton")
    problem = draw(lead, H, F, dtype=torch.bfloat16)
    return launched(problem, rank, world_size, dist.group.WORLD, **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"sequence_parallel": True}, {"sequence_parallel": True, "save": "nothing"}, {"forward_chunks": 2}],
    ids=["all-reduce", "slices", "slices, recomputing", "chunks"],
)
def test_two_ranks(options, ranks_of):
    lead, H, F = (520,), 64, 128
    given = (260,) if "sequence_parallel" in options else lead  # x is this rank's slice
    expected = explained(given, H, F, "gelu", world_size=2, **options)
    for found in ranks_of(2).run(launches_of_ranks, lead, H, F, options):
        assert found == expected


def test_what_it_prints():
    """The analysed model at P=4."""
    explanation = tp.explain((8, 128, 1024), 4096, world_size=4, arch="sm_90")
    text = str(explanation)
    assert "x [1024, 1024], F/P = 1024, gelu, bfloat16, on sm_90: 132 processors" in text
    assert [row.kernel for row in explanation.launches] == ["ffn", "linear_dact", "dgrad", "weight_grads"]
    assert "forward: single launch; 128 tiles of act on 132 processors, at most 4 on each" in text
    assert "128x64x64" in text
    assert "its speed is not measured" in text
    assert json.loads(json.dumps(explanation.to_dict()))["arch"] == "sm_90"


def test_reasons_are_those_of_the_launches_shown():
    chunks = tp.explain((16, 8192), 28672, world_size=8, forward_chunks=4, arch="sm_90")
    assert "few_tokens" not in str(chunks)
    assert "measured on this GPU" not in str(chunks), "an architecture that is only named"
    invariant = tp.explain((16, 8192), 28672, batch_invariant=True, arch="sm_90")
    assert invariant.reasons["tiles of forward"].startswith("the first row of the table of at most 64 columns")


def test_what_it_prints_of_few_tokens():
    explanation = tp.explain((16, 8192), 28672, world_size=8, arch="sm_90")
    assert explanation.launches[0].kernel == "few_tokens"
    assert "forward: few tokens; 16 tokens are one tile of 16 rows" in str(explanation)
    assert "tiles of few_tokens: the least tall row" in str(explanation)
    assert "in 4 slices" in str(tp.explain((16, 8192), 512, arch="sm_90"))
    assert "few_tokens" not in str(tp.explain((65, 8192), 3584, arch="sm_90"))


def test_where_nothing_is_launched(monkeypatch):
    monkeypatch.setattr(interpreter, "interpreting", lambda: False)
    explanation = tp.explain((8, 64), 128)
    assert explanation.arch == "native"
    assert not explanation.launches
    assert "torch and oneDNN" in str(explanation)


@pytest.mark.parametrize(
    ("shape", "F", "options", "message"),
    [
        ((), 64, {}, r"shape must be that of x, \[..., H\], got \(\)"),
        ((8, -1), 64, {}, "got .8, -1."),
        (64, 64, {}, "must be that of x, .* got 64"),
        ((8, 0), 64, {}, "hidden_size must be at least 1"),
        ((8, 64), 66, {"world_size": 4}, "66"),
        ((8, 64), 64, {"arch": "sm_70"}, "arch must be one of sm_80, sm_90, sm_100, gfx942, got 'sm_70'"),
        ((8, 64), 64, {"activation": "gleu"}, "gleu"),
        ((8, 64), 64, {"dtype": torch.int8}, "torch.int8"),
    ],
)
def test_bad_input(shape, F, options, message):
    with pytest.raises(ValueError, match=message):
        tp.explain(shape, F, **options)
