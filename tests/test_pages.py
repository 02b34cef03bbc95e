"""docs/pytorch.md and docs/huggingface.md are true: their Python runs as written, and so does every command."""

import json
import re
import shlex

import pytest
from torchrun import ROOT, run_block, torchrun

pytestmark = pytest.mark.cpu_only
PYTORCH, HUGGINGFACE = ((ROOT / "docs" / f"{name}.md").read_text() for name in ("pytorch", "huggingface"))


# As examples/rank_process.py does: threads of gloo that torch's DTensors leave may abort a process that ends.
LEAVE = "\nimport os, sys\nsys.stdout.flush()\nos._exit(0)\n"


def block(page: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    return code


def commands(page: str, script: str) -> list[list[str]]:
    """Return the arguments of a script in the page's torchrun commands, and their number of ranks first."""
    found = re.findall(rf"^    torchrun --nproc-per-node (\d+) examples/{script}(.*)$", page, re.MULTILINE)
    assert found
    return [[ranks, *shlex.split(arguments)] for ranks, arguments in found]


@pytest.mark.slow
def test_the_pytorch_example_runs_as_written(tmp_path):
    output = run_block(block(PYTORCH), tmp_path, epilogue=LEAVE)
    assert output.count("TensorParallelMLP torch.Size([256, 64]) torch.Size([64, 64])") == 4


@pytest.mark.slow
def test_the_huggingface_example_runs_as_written_and_prints_what_is_shown(tmp_path):
    transformers = pytest.importorskip("transformers")
    output = run_block(block(HUGGINGFACE), tmp_path, epilogue=LEAVE)
    (shown,) = re.findall(r"^It prints\n\n((?:    .*\n)+)", HUGGINGFACE, re.MULTILINE)
    assert output == re.sub(r"^    ", "", shown, flags=re.MULTILINE)
    assert transformers.LlamaForCausalLM.from_pretrained(tmp_path / "small-llama").config.intermediate_size == 192


@pytest.mark.slow
def test_training_dense_and_over_ranks_has_one_loss_and_serves_one_text(tmp_path):
    """The page's commands with fewer steps: each later flag overrides."""
    pytest.importorskip("tqdm")
    (ranks, *train), (ranks_saving, *saving) = commands(PYTORCH, "train_char_gpt.py")
    brief = [
        "--layers",
        "1",
        "--hidden",
        "32",
        "--ffn",
        "64",
        "--seq",
        "32",
        "--batch",
        "8",
        "--lr",
        "1e-2",
        "--log-every",
        "7",
    ]
    files = ["--json", "out.json", "--plot", "out.png"]
    script = str(ROOT / "examples" / "train_char_gpt.py")
    done = torchrun(int(ranks), script, *train, *brief, "--steps", "30", *files, folder=tmp_path)
    results = json.loads((tmp_path / "out.json").read_text())
    steps = results["steps"]
    assert [row["step"] for row in steps] == list(range(30))
    dense, *others = ([row[f"loss_{name}"] for row in steps] for name in ("dense", "tp2", "tp4"))
    for losses in others:
        assert losses == pytest.approx(dense, abs=1e-5, rel=0)
    assert dense[-1] < dense[0] - 1
    assert results["about"]["mlps"] == {"dense": "MLP", "tp2": "TensorParallelMLP", "tp4": "TensorParallelMLP"}
    assert results["summary"]["largest_difference"] == max(row["difference"] for row in steps)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    shown = {cells[0]: cells for line in done.stdout.splitlines() if (cells := line.split()) and cells[0].isdigit()}
    assert list(shown) == ["0", "7", "14", "21", "28", "29"], "rank 0 alone prints"
    assert shown["29"][1:4] == [f"{losses[-1]:.6f}" for losses in (dense, *others)]

    torchrun(int(ranks_saving), script, *saving, *brief, "--steps", "30", folder=tmp_path)
    ((ranks_serving, *serving),) = commands(PYTORCH, "serve_char_gpt.py")
    script = str(ROOT / "examples" / "serve_char_gpt.py")
    texts = []
    for processes in (1, int(ranks_serving)):
        served = torchrun(processes, script, *serving, "--characters", "40", folder=tmp_path)
        assert "no CUDA graph: there is no GPU" in served.stderr
        assert re.search(rf"called: [\d.]+ ms a character, {processes} ranks on cpu", served.stderr)
        texts.append(served.stdout)
    assert texts[0] == texts[1]
    assert texts[0].startswith("The kernel")
    assert len(texts[0]) == len("The kernel") + 40 + 1


@pytest.mark.slow
def test_generating_before_and_after(tmp_path):
    transformers = pytest.importorskip("transformers")
    for ranks, *arguments in commands(HUGGINGFACE, "generate_huggingface.py"):
        done = torchrun(int(ranks), str(ROOT / "examples" / "generate_huggingface.py"), *arguments, folder=tmp_path)
        assert f"4 MLPs replaced, over {ranks} ranks" in done.stdout
        assert "tokens: 32 of 32 as before" in done.stdout
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved-gpt2")
    assert type(saved).__name__ == "GPT2LMHeadModel"


def test_pytorch_quotes_its_file():
    (path,) = set(re.findall(r"\]\(\.\./(bench/results/.*?char_gpt\.json)\)", PYTORCH))
    found = json.loads((ROOT / path).read_text())["summary"]
    for which in ("first", "last"):
        cells = " | ".join(f"{found[f'{which}_loss_{name}']:.6f}" for name in ("dense", "tp2", "tp4"))
        assert f"| loss of the {which} batch | {cells} |" in PYTORCH
    assert f"steps: {found['largest_difference']:.1e};" in PYTORCH


@pytest.mark.parametrize("page", [PYTORCH, HUGGINGFACE], ids=["pytorch", "huggingface"])
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page)
    assert links
    for link in links:
        assert (ROOT / "docs" / link).exists(), link
