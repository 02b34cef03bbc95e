"""The examples of docs/pytorch.md and docs/huggingface.md refuse wrong arguments before any communication."""

import importlib
import json
import sys

import pytest
from torchrun import EXAMPLES

pytestmark = pytest.mark.cpu_only
SIZES = {"alphabet": "abc", "layers": 1, "hidden": 8, "ffn": 12, "heads": 2, "seq": 4, "gated": False}


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """Return a function: script, arguments, processes → what it says when it refuses them."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "sizes.json").write_text(json.dumps(SIZES))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "sizes.json").write_text("{}")

    def run(script, arguments, processes):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        if processes:
            monkeypatch.setenv("WORLD_SIZE", str(processes))
        with pytest.raises(SystemExit, match="2"):
            importlib.import_module(script).parse_arguments()
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("script", "arguments", "processes", "message"),
    [
        ("train_char_gpt", "--tp 2", None, "start it with torchrun"),
        ("train_char_gpt", "--tp two", 2, "--tp takes numbers with commas between them, got 'two'"),
        ("train_char_gpt", "--tp 1,2", 2, "--tp takes different numbers from 2 on"),
        ("train_char_gpt", "--tp 2,2", 2, "--tp takes different numbers from 2 on"),
        ("train_char_gpt", "--tp 3", 4, "--tp 3 does not divide the 4 processes"),
        ("train_char_gpt", "--tp 4 --ffn 6", 4, "--tp 4 does not divide --ffn 6"),
        ("train_char_gpt", "--heads 5", 2, "--heads 5 does not divide --hidden 96"),
        ("train_char_gpt", "--steps 0", 2, "--steps must be at least 1, got 0"),
        ("train_char_gpt", "--text none", 2, "--text: [Errno 2]"),
        ("train_char_gpt", "--seq 10000000", 2, "--seq 10000000 needs one more than that"),
        ("serve_char_gpt", "--model model --prompt a", None, "start it with torchrun"),
        ("serve_char_gpt", "--model nowhere", 2, "train_char_gpt.py --save nowhere makes it"),
        ("serve_char_gpt", "--model other", 2, "--model or --prompt:"),
        ("serve_char_gpt", "--model model --prompt xyz", 2, "not among the model's characters: ['x', 'y', 'z']"),
        ("serve_char_gpt", "--model model --prompt ''", 2, "--prompt needs at least one character"),
        ("serve_char_gpt", "--model model --prompt a", 5, "F=12 is not divisible by the 5 processes"),
        ("serve_char_gpt", "--model model --characters 0", 2, "--characters must be at least 1, got 0"),
        ("serve_char_gpt", "--model model --temperature -1", 2, "--temperature must be at least 0, got -1.0"),
        ("generate_huggingface", "", None, "start it with torchrun"),
        ("generate_huggingface", "--tokens 0", 2, "--tokens must be at least 1, got 0"),
        ("generate_huggingface", "--model nowhere", 2, "--model nowhere is not a folder with a config.json"),
        ("generate_huggingface", "--family bert", 2, "invalid choice: 'bert'"),
    ],
)
def test_wrong_arguments_are_refused(script, arguments, processes, message, refused):
    words = [word.strip("'") for word in arguments.split()]
    assert message in refused(script, words, processes)


@pytest.mark.parametrize(
    ("script", "missing", "extra"),
    [
        ("train_char_gpt", "tqdm", "examples"),
        ("train_char_gpt", "matplotlib", "examples"),
        ("generate_huggingface", "transformers", "huggingface"),
    ],
)
def test_what_is_missing_is_named_with_what_installs_it(script, missing, extra, refused, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == missing else find(name, *rest))
    assert f"needs {missing}: pip install 'tpffn-triton[{extra}]'" in refused(script, [], 2)
