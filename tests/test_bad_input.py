"""Wrong input: a clear error with the values in it, before anything is launched."""

import pytest
import torch
from launches import count_launches
from torch import nn

import tpffn_triton as tp
from tpffn_triton.sharding import shard_ffn, unshard_ffn


def t(*shape, dtype=torch.float32, device="cpu"):
    return torch.ones(shape, dtype=dtype, device=device)


GOOD = {"x": t(4, 8), "w1": t(12, 8), "w2": t(8, 12), "b1": t(12), "b2": t(8)}
BAD_CALLS = [
    ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    ({"b1": 0.5}, TypeError, "b1 must be a tensor, got float"),
    ({"w1": None}, TypeError, "w1 must be a tensor, got NoneType"),
    ({"x": t(4, 9)}, ValueError, r"x must be \[..., H=8\].*x \[4, 9\], w1 \[12, 8\]"),
    ({"x": torch.tensor(1.0)}, ValueError, r"x must be \[..., H=8\]"),
    ({"w1": t(12, 8, 1)}, ValueError, r"gelu expects w1 \[F/P, H\].*w1 \[12, 8, 1\]"),
    ({"activation": "swiglu"}, ValueError, r"w2 must be \[8, 6\] beside w1 \[2F/P=12, H=8\] with swiglu"),
    ({"activation": "geglu", "w1": t(11, 8)}, ValueError, r"geglu expects w1 \[2F/P, H\].*w1 \[11, 8\]"),
    ({"activation": "swiglu", "w1": t(24, 8)}, ValueError, r"b1 must be \[24\].*b1 \[12\]"),
    ({"w2": t(8, 13)}, ValueError, r"w2 must be \[8, 12\].*w2 \[8, 13\]"),
    ({"w2": t(12, 8)}, ValueError, r"w2 must be \[8, 12\].*w2 \[12, 8\]"),
    ({"b1": t(8)}, ValueError, r"b1 must be \[12\].*b1 \[8\]"),
    ({"b2": t(1, 8)}, ValueError, r"b2 must be \[8\].*b2 \[1, 8\]"),
    ({"w1": t(12, 8, dtype=torch.bfloat16)}, TypeError, "x torch.float32, w1 torch.bfloat16"),
    ({k: v.long() for k, v in GOOD.items()}, TypeError, "dtype torch.int64 is not one of torch.float32"),
    ({k: v.double() for k, v in GOOD.items()}, ValueError, "ffn Linear1 first operand: dtype torch.float64 is not one"),
    ({"w2": t(8, 12, device="meta")}, ValueError, "x cpu, w1 cpu, w2 meta"),
    ({"activation": "swish"}, ValueError, "activation 'swish' is not one of gelu, .*swiglu"),
    ({"activation": ["gelu"]}, ValueError, r"activation \['gelu'\] is not one of"),
    ({"save": "all"}, ValueError, "save 'all' is not one of pre_act, nothing"),
    ({"reduce_dtype": torch.bfloat16}, ValueError, "reduce_dtype torch.bfloat16 is not one of None, torch.float32"),
    ({"forward_chunks": 0}, ValueError, "forward_chunks must be at least 1, got 0"),
    ({"forward_chunks": 2.0}, TypeError, "forward_chunks must be an int, got 2.0"),
    ({"forward_chunks": 2, "sequence_parallel": True}, ValueError, "forward_chunks=2 cuts an all-reduce"),
    ({"x": t(8), "sequence_parallel": True}, ValueError, r"x must be \[S/P, ..., H\], .* got \[8\]"),
    ({"gradient_accumulation_fusion": True, "w1": nn.Parameter(t(12, 8))}, ValueError, "w1.main_grad, .* got None"),
    ({"tp_group": "world"}, TypeError, "tp_group must be None, a ProcessGroup or a 1-D DeviceMesh, got str"),
]


@pytest.mark.cpu_only
@pytest.mark.parametrize(("change", "error", "message"), BAD_CALLS, ids=[m for _, _, m in BAD_CALLS])
def test_ffn_rejects(change, error, message):
    with count_launches() as launches, pytest.raises(error, match=message):
        tp.ffn(**GOOD | change)
    assert not launches


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((0, 8), {}, ValueError, "hidden_size must be at least 1, got 0"),
        ((8, -4), {}, ValueError, "ffn_hidden_size must be at least 1, got -4"),
        ((8.0, 16), {}, TypeError, "hidden_size must be an int, got 8.0"),
        ((8, 16), {"activation": "tanh"}, ValueError, "activation 'tanh' is not one of"),
        ((8, 16), {"save": "x"}, ValueError, "save 'x' is not one of"),
        ((8, 16), {"forward_chunks": -1}, ValueError, "forward_chunks must be at least 1, got -1"),
        ((8, 16), {"tp_group": 4}, TypeError, "tp_group must be None, a ProcessGroup .* got int"),
    ],
)
def test_module_rejects(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        tp.TensorParallelFFN(*args, **kwargs)


@pytest.mark.parametrize(
    ("fc1", "fc2", "error", "message"),
    [
        (nn.Identity(), nn.Linear(4, 2), TypeError, "fc1 must be nn.Linear, got Identity"),
        (nn.Linear(2, 4), nn.Linear(4, 2).double(), TypeError, "fc1 torch.float32, fc2 torch.float64"),
        (nn.Linear(2, 4), nn.Linear(4, 3), ValueError, "fc1 2 → 4, fc2 4 → 3"),
        (nn.Linear(2, 4), nn.Linear(4, 2, bias=False), ValueError, "fc1.bias True, fc2.bias False"),
    ],
)
def test_from_dense_rejects(fc1, fc2, error, message):
    with pytest.raises(error, match=message):
        tp.TensorParallelFFN.from_dense(fc1, fc2)


def test_from_dense_of_a_gated_layer_wants_gate_and_up():
    with pytest.raises(ValueError, match="fc1, gate and up: fc1 2 → 4, fc2 4 → 2"):
        tp.TensorParallelFFN.from_dense(nn.Linear(2, 4), nn.Linear(4, 2), activation="swiglu")


def test_sharding_rejects():
    w1, b1, w2, b2 = t(12, 8), t(12), t(8, 12), t(8)
    with pytest.raises(ValueError, match="ffn_hidden_size 12 is not divisible by the tensor-parallel world_size 5"):
        shard_ffn(w1, b1, w2, b2, 0, 5, activation="gelu")
    for rank in (-1, 4):
        with pytest.raises(ValueError, match=f"rank {rank} is outside of world_size 4"):
            shard_ffn(w1, b1, w2, b2, rank, 4, activation="gelu")
    with pytest.raises(ValueError, match=r"w2 must be \[8, 12\]"):
        shard_ffn(w1, b1, w1, b2, 0, 4, activation="gelu")
    shards = [shard_ffn(w1, b1, w2, b2, r, 2, activation="gelu") for r in range(2)]
    with pytest.raises(ValueError, match=r"column_row with swiglu .* w1 \[6, 8\].*w1 \[3, 8\]"):
        unshard_ffn([(w1[:3], None, w2[:, :3], b2)], activation="swiglu")
    with pytest.raises(ValueError, match="at least one shard"):
        unshard_ffn([], activation="gelu")
    with pytest.raises(ValueError, match="shards differ in shape"):
        unshard_ffn([shards[0], (*shards[1][:3], None)], activation="gelu")
    with pytest.raises(ValueError, match="rank 1's differs"):
        unshard_ffn([shards[0], (*shards[1][:3], b2 + 1)], activation="gelu")


def test_loading_a_checkpoint_of_another_p_names_the_shapes():
    full = tp.TensorParallelFFN(8, 16).state_dict()
    half = {k: v[: v.shape[0] // 2] if "fc1" in k else v for k, v in full.items()}
    with pytest.raises(RuntimeError, match=r"linear_fc1.weight.*\[8, 8\].*\[16, 8\]"):
        tp.TensorParallelFFN(8, 16).load_state_dict(half)


def test_backend_of_an_unknown_device():
    with pytest.raises(ValueError, match="computes on cuda and cpu tensors, got device 'meta'"):
        tp.backend("meta")
