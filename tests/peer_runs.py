"""Run bench/peers.py in the tests' own process, with peers that the caller breaks."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from commands import ROOT

sys.path.insert(0, str(ROOT / "bench"))

import environment
import peers
from peer_implementations import PEERS

SIZES = ["--hidden", "32", "--ffn", "48", "--iters", "3", "--quick"]


@contextlib.contextmanager
def peers_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """Run the command line in this process, where kernels are interpreted; its threads are put back."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(environment, "_git", lambda *arguments: "abc" if "rev-parse" in arguments else "")
    threads = torch.get_num_threads()
    yield lambda *arguments: peers.main([*SIZES, *arguments] if "--tokens" in arguments else list(arguments))
    torch.set_num_threads(threads)


def replaced(monkeypatch: pytest.MonkeyPatch, name: str, build: Any) -> None:
    """Have a peer be built otherwise."""
    monkeypatch.setitem(PEERS, name, dataclasses.replace(PEERS[name], build=build))


def raising(*given: Any) -> Any:
    """Fail."""
    raise ArithmeticError("not here")
