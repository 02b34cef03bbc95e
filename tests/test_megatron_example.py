"""examples/train_gpt_megatron.py: two ranks train both models to one loss; wrong arguments are refused."""

import importlib.util
import json
import resource
import sys
from types import SimpleNamespace

import pytest
import torch
from torchrun import EXAMPLES, torchrun

from tpffn_triton.megatron_options import activation_of

pytestmark = pytest.mark.cpu_only
EXAMPLE = EXAMPLES / "train_gpt_megatron.py"
MEMORY_BYTES = 16 << 30  # addresses of one process: a bias returned as it is recurses until the machine is full
SIZES = "--layers 1 --hidden 32 --ffn 128 --seq 32 --batch 4 --lr 1e-2 --steps 16 --log-every 5"
FLAGS = f"--tp 2 --sequence-parallel --recompute mlp --activation swiglu {SIZES}"
RANDOM_GUESS = 5.55  # log 256


@pytest.fixture(scope="module")
def example():
    """The script as a module. Its neighbours are on its path; none of them imports Megatron-Core by itself."""
    sys.path.insert(0, str(EXAMPLE.parent))
    try:
        spec = importlib.util.spec_from_file_location("train_gpt_megatron", EXAMPLE)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(EXAMPLE.parent))


@pytest.mark.slow
def test_two_ranks_train_both_models_to_one_loss(tmp_path):
    pytest.importorskip("megatron.core")
    limit = MEMORY_BYTES, MEMORY_BYTES
    done = torchrun(
        2,
        *(str(EXAMPLE), *FLAGS.split(), "--json", "out.json", "--plot", "out.png"),
        folder=tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, limit),
    )

    results = json.loads((tmp_path / "out.json").read_text())
    assert results["about"]["mlp"] == {"megatron": "MLP", "fused": "FusedMLP"}
    assert results["about"]["ranks"] == results["about"]["tp"] == 2
    steps = results["steps"]
    assert [row["step"] for row in steps] == list(range(16))
    megatron, fused = ([row[f"loss_{name}"] for row in steps] for name in ("megatron", "fused"))
    assert fused == pytest.approx(megatron, abs=1e-5, rel=0)
    assert results["summary"]["largest_difference"] == max(abs(a - b) for a, b in zip(megatron, fused, strict=True))
    assert megatron[0] == pytest.approx(RANDOM_GUESS, abs=0.2)
    assert megatron[-1] < megatron[0] - 1.5
    assert all(row[f"ms_{name}"] > 0 for row in steps for name in ("megatron", "fused"))
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")

    table = [text.split() for text in done.stdout.splitlines()]
    shown = {int(cells[0]): cells for cells in table if cells and cells[0].isdigit()}
    assert list(shown) == [0, 5, 10, 15], "progress comes from rank 0 alone"
    assert shown[15][1:3] == [f"{megatron[-1]:.6f}", f"{fused[-1]:.6f}"]
    assert "recurses for ever" in done.stderr, "it says that Megatron's MLP is not recomputed"


@pytest.mark.parametrize(
    ("flags", "world_size", "message"),
    [
        ("--tp 3", "4", "--tp 3 does not divide the 4 processes"),
        ("--tp 4 --ffn 6", "4", "--tp 4 does not divide --ffn 6"),
        ("--tp 4 --heads 2", "4", "--tp 4 does not divide --heads 2"),
        ("--tp 4 --seq 30 --sequence-parallel", "4", "--tp 4 does not divide --seq 30"),
        ("--tp 3 --ffn 6 --heads 3", "3", "--tp 3 does not divide the vocabulary of 256 bytes"),
        ("--heads 3", "1", "--heads 3 does not divide --hidden 64"),
        ("--batch 7 --tp 2", "4", "--batch 7 is not divisible by the 2 data-parallel replicas"),
        ("--steps 0", "1", "--steps must be at least 1, got 0"),
        ("--activation selu", "1", "invalid choice: 'selu'"),
        ("--recompute mlp --mlp megatron", "1", "Megatron's own MLP recurses for ever"),
        ("--text no_such_file", "1", "--text: [Errno 2] No such file or directory: 'no_such_file'"),
        ("--seq 10000000", "1", "--seq 10000000 needs one more than that"),
        ("", None, "start it with torchrun"),
    ],
)
def test_wrong_arguments_are_refused_before_any_communication(flags, world_size, message, example, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_gpt_megatron.py", *flags.split()])
    monkeypatch.setattr(example, "is_installed", lambda name: True)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world_size:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    with pytest.raises(SystemExit, match="2"):
        example.parse_arguments()
    assert message in capsys.readouterr().err


def test_without_megatron_core_it_says_what_to_install(example, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_gpt_megatron.py"])
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setitem(sys.modules, "megatron", None)
    monkeypatch.delitem(sys.modules, "megatron.core", raising=False)
    with pytest.raises(SystemExit, match="2"):
        example.parse_arguments()
    (message,) = capsys.readouterr().err.splitlines()
    assert message.endswith("needs megatron-core: pip install 'tpffn-triton[megatron]'")


def test_options_of_an_activation_select_it(example):
    for name, (function, gated, fusion) in example.ACTIVATIONS.items():
        config = SimpleNamespace(activation_func=function, gated_linear_unit=gated, bias_activation_fusion=fusion)
        assert activation_of(config) == name


def test_replicas_share_a_batch(example):
    """The tokens of a step are the same however many replicas share them, and others in the next step."""
    args = SimpleNamespace(seed=1, seq=8, batch=4)
    text = torch.arange(500)
    whole = example.batch(args, text, 3, 0, 1)
    assert whole.shape == (4, 9)
    assert torch.equal(torch.cat([example.batch(args, text, 3, replica, 2) for replica in range(2)]), whole)
    assert not torch.equal(example.batch(args, text, 4, 0, 1), whole)
    assert torch.equal(whole[:, 1:], whole[:, :-1] + 1), "consecutive bytes"


@pytest.mark.parametrize("names", [["fused"], ["megatron", "fused"]])
def test_equal_losses_can_be_drawn(names, example, tmp_path):
    """A difference of 0 is not on a log axis; one model alone has no difference."""
    rows = [{"step": step, "difference": 0.0} | {f"loss_{name}": 5.0 - step for name in names} for step in range(3)]
    example.loss_report.plot(rows, dict.fromkeys(names, "a"), "title", tmp_path / "out.png", unit="nats")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_the_median_leaves_out_the_first_steps(example):
    rows = [{"step": step, "loss_fused": 1.0, "ms_fused": 500.0 if step < 5 else 2.0} for step in range(8)]
    assert example.loss_report.summary(rows, ["fused"])["ms_fused"] == 2.0
