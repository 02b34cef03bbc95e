"""Replaced MLPs on a GPU, and interpreted on CPU tensors; over several by NCCL. The rest is tested on CPU ranks."""

import copy
import importlib

import pytest
import style_cases
import torch
import torch.distributed as dist
from ffn_cases import assert_all_accurate, draw, exact, results
from mlp_modules import as_module, names_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from torchrun import EXAMPLES

from tpffn_triton.huggingface import parallelize
from tpffn_triton.kernels.activations import ACTIVATIONS
from tpffn_triton.parallel_style import FusedFFNParallel
from tpffn_triton.reference import ffn_reference
from tpffn_triton.tensor_parallel_mlp import TensorParallelMLP

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def of_module(mlp, names, problem, conv1d):
    """Return (y, dx, dw1, dw2, db1, db2) of a replaced module."""
    x = problem.x.clone().requires_grad_()
    y = mlp(x)
    y.backward(problem.dy)
    found = [torch.cat([mlp.get_parameter(name).grad for name in names[ours]]) for ours in ("w1", "w2", "b1", "b2")]
    return y.detach(), x.grad, *(t.t() if conv1d and t.dim() == 2 else t for t in found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("activation", "conv1d"), [*((name, False) for name in ACTIVATIONS), ("gelu_tanh", True)])
def test_a_replaced_module_equals_the_reference(activation, conv1d, dtype, device):
    problem = draw((3, 20), 64, 96, activation=activation, dtype=dtype, device=device)
    mlp = as_module(problem, conv1d)
    names = names_of(mlp)
    parallelize(mlp)
    assert type(mlp) is TensorParallelMLP
    eager = results(lambda *t: ffn_reference(*t, activation=activation), problem.leaves(), problem.dy)
    assert_all_accurate(of_module(mlp, names, problem, conv1d), eager, exact(problem))


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_a_cuda_graph_replays_bit_for_bit(activation):
    """Inference with what is replaced, as examples/serve_char_gpt.py does it."""
    problem = draw((1, 64), 256, 512, activation=activation, dtype=torch.bfloat16, device="cuda")
    mlp = as_module(problem)
    parallelize(mlp)
    static = torch.zeros_like(problem.x)
    with torch.inference_mode():
        right = mlp(problem.x)
        mlp(static)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = mlp(static)
        for _ in range(3):
            static.copy_(problem.x)
            y.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(y, right)


@pytest.mark.gpu
def test_moving_to_a_gpu_keeps_gate_and_up_side_by_side():
    problem = draw((2, 9), 32, 64, activation="swiglu")
    mlp = as_module(problem)
    right = copy.deepcopy(mlp)(problem.x)
    parallelize(mlp)
    mlp.cuda()
    gate, up = mlp.gate_proj.weight, mlp.up_proj.weight
    assert up.data_ptr() == gate.data_ptr() + gate.nbytes
    torch.testing.assert_close(mlp(problem.x.cuda()).cpu(), right, rtol=1e-4, atol=1e-4)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("activation", "layout"), [("gelu", "replicate"), ("swiglu", "replicate"), ("swiglu", 1)])
def test_over_gpus_it_equals_the_reference(activation, layout, dtype, nccl_ranks):
    nccl_ranks.run(style_cases.equals_reference, "triton", 2, activation, dtype, layout, False, "cuda")


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_without_gradients_nothing_is_kept(activation, device):
    """And a module around it may be copied and cast."""
    model = nn.Sequential(as_module(draw((2, 9), 32, 64, activation=activation, device=device)))
    parallelize(model)
    x = torch.randn(2, 9, 32, device=device)
    with torch.no_grad():
        right = model(x)
    twin = copy.deepcopy(model).to(torch.bfloat16)
    assert not right.requires_grad
    torch.testing.assert_close(twin(x.bfloat16()).float(), right, rtol=5e-2, atol=5e-2)


def test_gate_and_up_in_one_memory_but_the_other_order(device):
    """As views of a matrix with up above gate would be."""
    problem = draw((2, 9), 32, 64, activation="swiglu", device=device)
    mlp = as_module(problem)
    right = mlp(problem.x)
    up, gate = torch.cat([mlp.up_proj.weight.data, mlp.gate_proj.weight.data]).split(64)
    mlp.up_proj.weight.data, mlp.gate_proj.weight.data = up, gate
    parallelize(mlp)
    torch.testing.assert_close(mlp(problem.x), right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_torch_func_sees_parameters(activation, device):
    """functional_call under grad: the gradients of backward."""
    problem = draw((2, 9), 32, 64, activation=activation, device=device)
    mlp = as_module(problem)
    parallelize(mlp)
    parameters = dict(mlp.named_parameters())

    def loss(parameters):
        return (torch.func.functional_call(mlp, parameters, (problem.x,)) * problem.dy).sum()

    gradients = torch.func.grad(loss)(parameters)
    loss(parameters).backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_the_served_model_is_one_cuda_graph(monkeypatch):
    """examples/serve_char_gpt.py's capture, over NCCL with one rank: DTensors on a GPU."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    char_gpt, serve = importlib.import_module("char_gpt"), importlib.import_module("serve_char_gpt")
    sizes = char_gpt.Sizes("abcdef", 2, 64, 128, 4, 32, True)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = char_gpt.CharGPT(sizes).cuda().eval()
        mesh = init_device_mesh("cuda", (1,))
        parallelize_module(model, mesh, {"blocks.*.mlp": FusedFFNParallel()})
        with torch.inference_mode():
            replay = serve.captured(model, torch.zeros(1, 32, dtype=torch.long, device="cuda"))
        prompt = torch.tensor([0, 1, 2], device="cuda")
        texts = [serve.generate(forward, prompt, 32, 40, 0.0)[0] for forward in (model, replay)]
        assert torch.equal(*texts)
        assert texts[0].shape == (43,)
    finally:
        dist.destroy_process_group()
