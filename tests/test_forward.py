"""The forms of forward: which one is chosen, and that all compute the same."""

import pytest
import torch
from acceptance import assert_accurate
from kernel_cases import FEW_TOKENS, FFN_SHAPES, assert_same, ffn_operands, ffn_results, need_sm_90, randn
from launches import count_launches

from tpffn_triton import interpreter
from tpffn_triton.kernels._configs import MOST_WAVES, PROCESSORS
from tpffn_triton.kernels._launch import Operand
from tpffn_triton.kernels.forward import DEPENDENT, FEW, FORMS, SINGLE, TWO, ffn_forward, forward_form

pytestmark = pytest.mark.usefixtures("poisoned_memory")
interpreter.install()


def of(rows: int, cols: int, stride: int | None = None) -> Operand:
    return Operand((rows, cols), (stride or cols, 1), torch.bfloat16, torch.device("cpu"), 0)


@pytest.mark.parametrize(
    ("arch", "M", "features", "form"),
    [
        ("sm_90", 1024, 1024, SINGLE),
        ("sm_90", 1, 3584, FEW),
        ("sm_90", 64, 3584, FEW),
        ("sm_90", 65, 3584, SINGLE),
        ("sm_80", 16, 1024, FEW),
        ("gfx942", 16, 1024, TWO),
        ("sm_90", 8192, 8192, DEPENDENT),
        ("sm_100", 8192, 8192, DEPENDENT),
        ("sm_80", 1024, 1024, SINGLE),
        ("sm_80", 8192, 8192, TWO),
        ("gfx942", 1024, 1024, TWO),
        ("sm_90", 0, 1024, TWO),
        ("sm_90", 1024, 0, TWO),
    ],
)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_the_form_follows_the_size(arch, M, features, form, activation):
    rows = features * (2 if activation == "swiglu" else 1)
    choice = forward_form(of(M, 1024), of(rows, 1024), of(1024, features), activation, arch)
    assert choice.form == form
    assert ("size 0" if 0 in (M, features) else "one tile" if form == FEW else str(PROCESSORS[arch])) in choice.why


def test_no_outputs():
    assert forward_form(of(64, 0), of(32, 0), of(0, 32), "gelu", "sm_90").form == TWO


def test_the_boundary_is_in_the_table():
    """128×128 tiles of act: one launch up to MOST_WAVES × PROCESSORS of them."""
    tiles = MOST_WAVES["sm_90"] * PROCESSORS["sm_90"]
    for more, form in ((0, SINGLE), (1, DEPENDENT)):
        choice = forward_form(of(128 * (tiles + more), 64), of(128, 64), of(64, 128), "gelu", "sm_90")
        assert choice.form == form
        assert f"{tiles + more} tiles" in choice.why
        assert choice.config is None, "the launches ask the tables"


@pytest.mark.parametrize("keep", ["pre_act", "act", "nothing"])
@pytest.mark.parametrize("activation", ["gelu", "geglu"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_computes_the_same(form, activation, keep, device):
    if form == DEPENDENT:
        need_sm_90(device, "dependent launches")
    args = ffn_operands(randn, FEW_TOKENS if form == FEW else FFN_SHAPES["tiles"], activation, torch.bfloat16, device)
    exact = ffn_results([t.double() for t in args], activation)
    eager = ffn_results(args, activation)
    with count_launches() as launches:
        y, kept = ffn_forward(*args, activation, keep, form=form)
    assert sum(launches.values()) == (1 if form in (FEW, SINGLE) else 2)
    assert_accurate("y", y, eager[0], exact[0])
    if keep == "nothing":
        assert kept is None
    else:
        assert_accurate(keep, kept, *(results[1 if keep == "act" else 2] for results in (eager, exact)))
    assert_same((y,), ffn_forward(*args, activation, keep, form=form)[:1])


def test_one_launch_where_it_is_chosen(device):
    args = ffn_operands(randn, FFN_SHAPES["odd"], "swiglu", torch.bfloat16, device)
    with count_launches() as launches:
        ffn_forward(*args, "swiglu", "nothing")
    assert launches == {"ffn_kernel": 1}
    args[0] = randn(40, 45, dtype=torch.bfloat16, device=device)  # few, but their rows are odd
    with count_launches() as launches:
        ffn_forward(*args, "swiglu", "nothing")
    assert launches == {"ffn_kernel": 1}
    few = ffn_operands(randn, FEW_TOKENS, "swiglu", torch.bfloat16, device)
    with count_launches() as launches:
        ffn_forward(*few, "swiglu", "nothing")
    assert launches == {"few_tokens_kernel": 1}
    with count_launches() as launches:
        ffn_forward(args[0][:0], *args[1:], "swiglu", "nothing")
    assert not launches, "nothing to compute"


def test_rejected(device):
    args = ffn_operands(randn, FFN_SHAPES["smoke"], "gelu", torch.bfloat16, device)
    for options in (("act_pre",), ("act", None, False, "three launches")):
        with count_launches() as launches, pytest.raises(ValueError, match=options[-1]):
            ffn_forward(*args, "gelu", *options)
        assert not launches
    for name, i in (("Linear1 first operand", 0), ("Linear1 weight", 1), ("Linear2 weight", 3)):
        for wrong in (torch.ones(8, dtype=torch.bfloat16), torch.tensor(1.0, dtype=torch.bfloat16)):
            operands = [*args[:i], wrong.to(device), *args[i + 1 :]]
            with pytest.raises(ValueError, match=rf"ffn {name}: expected a 2-D tensor .* got \({'8,' * wrong.dim()}\)"):
                ffn_forward(*operands, "gelu", "nothing")
    with pytest.raises(ValueError, match=r"batch-invariant forward has one form, .* got form 'two launches'"):
        ffn_forward(*args, "gelu", "nothing", batch_invariant=True, form=TWO)
    many, odd = (ffn_operands(randn, FFN_SHAPES[name], "gelu", torch.bfloat16, device) for name in ("tiles", "odd"))
    odd[0] = odd[0][:8]
    for refused in (many, odd):  # too many tokens; H and F that are no multiples of 8
        with pytest.raises(ValueError, match="'few tokens' takes at most a tile"):
            ffn_forward(*refused, "gelu", "nothing", form=FEW)


@pytest.mark.gpu
def test_dependent_launches_in_a_graph():
    need_sm_90("cuda", "dependent launches")
    args = ffn_operands(randn, (1000, 256, 512, 256), "gelu", torch.bfloat16, "cuda")
    expected_y, _ = ffn_forward(*args, "gelu", "nothing", form=TWO)
    graph = torch.cuda.CUDAGraph()
    ffn_forward(*args, "gelu", "nothing", form=DEPENDENT)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y, _ = ffn_forward(*args, "gelu", "nothing", form=DEPENDENT)
    for _ in range(1000):
        y.zero_()
        graph.replay()
        assert torch.equal(y, expected_y)
