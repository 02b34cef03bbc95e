"""Distributed checkpoints of megatron-core's MLP and of FusedMLP, on a rank (megatron_ranks.py)."""

import inspect
import multiprocessing.dummy
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async
from megatron.core.transformer.mlp import MLP, apply_swiglu_sharded_factory
from megatron_cases import build, class_of, config_of, draw_input, results
from megatron_ranks import SEQUENCE, VOCABULARY, Layer, Training
from megatron_training_cases import model_of
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

# Files are written by forked processes, which ranks, being daemons, may not have: by threads here.
async_utils.mp = filesystem_async.mp = SimpleNamespace(get_context=lambda _: multiprocessing.dummy)


def state_of(mlp: Any, separate: bool) -> dict:
    """Return the state to save or load. separate: gate and up under names of their own, as newer versions can."""
    metadata: dict[str, Any] | None = {"singleton_local_shards": True} if separate else None
    if type(mlp) is MLP:  # from 0.16 on it needs one, which models put there
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        metadata = {**(metadata or {}), "dp_cp_group": group}
    return mlp.sharded_state_dict(prefix="mlp.", metadata=metadata)


def saved(name: str, layer: Layer, separate: bool, folder: str) -> tuple[dict[str, Tensor], Tensor]:
    """Save an MLP of a class; return its shards and its output."""
    mlp = build(class_of(name), config_of(layer), seed=11)
    dist_checkpointing.save(state_of(mlp, separate), folder)
    return shards_and_output(mlp)


def loaded(name: str, layer: Layer, separate: bool, folder: str) -> tuple[dict[str, Tensor], Tensor]:
    """Load into an MLP of a class that has other weights; return its shards and its output."""
    mlp = build(class_of(name), config_of(layer), seed=77)
    try:
        state = dist_checkpointing.load(state_of(mlp, separate), folder)
    except CheckpointException as error:  # no Exception: it would end the rank
        raise AssertionError(f"{name} cannot load it: {error}") from error
    mlp.load_state_dict({key.removeprefix("mlp."): value for key, value in state.items()})
    return shards_and_output(mlp)


def model_saved(name: str, case: Training, folder: str) -> float:
    """Save a whole GPT with MLPs of a class; return its loss."""
    _, model = model_of(case, class_of(name))
    dist_checkpointing.save(model.sharded_state_dict(), folder)
    return loss_of(model)


def model_loaded(name: str, case: Training, folder: str) -> tuple[float, float]:
    """Load it into one with other weights; return its loss before and after."""
    _, model = model_of(case, class_of(name))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    before = loss_of(model)
    try:
        state = dist_checkpointing.load(model.sharded_state_dict(), folder)
    except CheckpointException as error:
        raise AssertionError(f"{name} cannot load it: {error}") from error
    model.load_state_dict(state)
    return before, loss_of(model)


@torch.no_grad()
def loss_of(model: Any) -> float:
    """Return a GPT's loss of some tokens, the same on every rank."""
    tokens = torch.arange(SEQUENCE + 1)[None] * 7 % VOCABULARY
    positions, mask = torch.arange(SEQUENCE)[None], torch.ones(SEQUENCE, SEQUENCE).triu(1).bool()[None, None]
    return model(tokens[:, :-1].contiguous(), positions, mask, labels=tokens[:, 1:].contiguous()).mean().item()


def shards_and_output(mlp: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Return this rank's parameters by name, and y + bias."""
    found = results(mlp, *draw_input(mlp.config))
    return {name: p.detach() for name, p in mlp.named_parameters()}, found["y + bias"].detach()


def can_save() -> bool:
    """Say whether this version of megatron-core knows an argument that newer torch wants when it writes."""
    return "serialization_format" in inspect.getsource(filesystem_async)


def can_separate() -> bool:
    """Say whether this version of megatron-core knows singleton_local_shards."""
    return "singleton_local_shards" in inspect.signature(apply_swiglu_sharded_factory).parameters
