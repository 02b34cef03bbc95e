"""Measured rows: files of bench/tune.py are read, checked, and used near the sizes they were measured at alone."""

import json
import warnings
from dataclasses import asdict, fields

import pytest
import torch
import triton
from acceptance import assert_accurate
from kernel_cases import TINY, randn

import tpffn_triton as tp
from tpffn_triton import interpreter
from tpffn_triton.kernels import _configs, _launch, _tuned, forward, matmul
from tpffn_triton.kernels._config import Config
from tpffn_triton.kernels._configs import MOST_WAVES, PROCESSORS
from tpffn_triton.kernels._launch import Operand
from tpffn_triton.kernels.forward import DEPENDENT, SINGLE, TWO, ffn_forward, forward_form
from tpffn_triton.kernels.matmul import dgrad, linear, linear_into, wgrad

pytestmark = pytest.mark.cpu_only
interpreter.install()
GPU = torch.device("cuda", 0)
NAME = "NVIDIA H100 80GB HBM3"


def config_of(**changes) -> dict:
    return {k: v for k, v in asdict(TINY).items() if k != "origin"} | changes


def row(kernel="linear", sizes=(4096, 8192, 3584), config=None, us=11.3, arithmetic="16bit", **more) -> dict:
    rows, cols, inner = sizes
    return {
        "kernel": kernel,
        "arithmetic": arithmetic,
        "rows": rows,
        "cols": cols,
        "inner": inner,
        "config": config,
        "us": us,
        "table_us": 12.0,
        "cublas_us": None,
        "candidates": 4,
        **more,
    }


@pytest.fixture
def write(tmp_path):
    def write(rows, name="tuned.json", **changes):
        data = {"schema": 1, "device": NAME, "arch": "sm_90", "triton": triton.__version__, "torch": "2.11.0"}
        path = tmp_path / name
        path.write_text(json.dumps(data | {"date": "2026-11-28T12:00:00+00:00", "commit": "0", "rows": rows} | changes))
        return path

    return write


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Signatures of a GPU's tensors, which it needs not be there for; what is loaded is forgotten afterwards."""
    monkeypatch.setattr(_configs, "_gpu_name", lambda device: NAME)
    monkeypatch.setattr(_configs, "arch_of", lambda device: "sm_90")
    monkeypatch.setattr(_tuned, "_loaded", {})
    yield
    _tuned.nearest.cache_clear()
    for kept in _launch._prepared:
        kept.cache_clear()


def of(rows, cols) -> Operand:
    return Operand((rows, cols), (cols, 1), torch.bfloat16, GPU, 0)


def test_a_measured_row_is_used_near_its_sizes(write, on_a_gpu):
    wanted = config_of(BLOCK_M=64, BLOCK_N=256)
    rows = [row(config=wanted, sizes=(1024, 1024, 1024)), row(config=config_of(), sizes=(4096, 1024, 1024), us=50)]
    assert tp.load_tuning(write(rows)) == NAME
    like = of(1, 1)
    for M, found in ((1024, 64), (1400, 64), (730, 64), (4096, 32), (2900, 32)):
        config = _configs.select("linear", like, M, 1024, 1024)
        assert found == config.BLOCK_M
        assert f"on {NAME}, 2026-11-28, triton {triton.__version__}" in config.origin
    for sizes in ((2048, 1024, 1024), (700, 1024, 1024), (1024, 2048, 1024), (1024, 1024, 512)):
        assert _configs.select("linear", like, *sizes).origin == "compiles"
    # Of another kernel, arithmetic or architecture; where the architecture is only named; and on no GPU.
    assert _configs.select("dgrad", like, 1024, 1024, 1024).origin == "compiles"
    assert _configs.select("linear", like._replace(dtype=torch.float32), 1024, 1024, 1024).origin == "compiles"
    assert _configs.select("linear", like, 1024, 1024, 1024, "sm_90").origin == "compiles"
    assert _configs.select("linear", like._replace(device=torch.device("cpu")), 1024, 1024, 1024).origin == "compiles"


def test_the_nearest_of_several_counts(write, on_a_gpu):
    rows = [row(config=config_of(BLOCK_K=k), sizes=(M, 512, 512)) for M, k in ((1000, 32), (1100, 64), (1300, 128))]
    tp.load_tuning(write(rows))
    for M, k in ((1000, 32), (1060, 64), (1250, 128)):
        assert k == _configs.select("linear", of(1, 1), M, 512, 512).BLOCK_K


def test_what_is_loaded_comes_first_and_is_used_at_once(write, on_a_gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(_tuned, "FOLDER", tmp_path)
    shipped = write([row(config=config_of(BLOCK_K=64))], name=_tuned.file_of(NAME).name)
    assert shipped == _tuned.file_of(NAME)
    sizes = 4096, 8192, 3584
    assert _configs.select("linear", of(1, 1), *sizes).BLOCK_K == 64
    prepared = matmul._prepare_matmul
    prepared.cache_clear()
    x, w = (torch.zeros(32, 32, dtype=torch.bfloat16) for _ in range(2))
    linear(x, w, None)
    assert prepared.cache_info().currsize == 1
    tp.load_tuning(write([row(config=config_of(BLOCK_K=128))]))
    assert prepared.cache_info().currsize == 0, "what was prepared before the file counted"
    assert _configs.select("linear", of(1, 1), *sizes).BLOCK_K == 128


def test_a_row_for_few_tokens_must_fit_them(write, on_a_gpu):
    tp.load_tuning(write([row("few_tokens", (14, 3584, 8192), config_of(BLOCK_M=16, SPLIT_K=2))]))
    assert _configs.select_for_few_tokens("few_tokens", of(1, 1), 16, 3584, 8192).SPLIT_K == 2
    assert _configs.select_for_few_tokens("few_tokens", of(1, 1), 17, 3584, 8192).BLOCK_M == 32


WRONG = {
    "not JSON": ("{", "not JSON"),
    "no object": ([], 'expected an object with "schema": 1'),
    "another schema": ({"schema": 2}, 'expected an object with "schema": 1'),
    "another triton": ({"triton": "2.1.0"}, "measured with triton 2.1.0, this is"),
    "no device": ({"device": None}, "device, triton and date must be text"),
    "no rows": ({"rows": {}}, "rows must be a list, got dict"),
    "a row without a kernel": ({"rows": [{"rows": 1}]}, "a row lacks a field"),
    "an unknown kernel": ({"rows": [row("linaer")]}, "no kernel 'linaer' in arithmetic '16bit'"),
    "an unknown arithmetic": ({"rows": [row(arithmetic="8bit")]}, "no kernel 'linear' in arithmetic '8bit'"),
    "too deep": ("[" * 100_000, "not JSON"),
    "slices of another kernel": (
        {"rows": [row(config=config_of(SPLIT_K=2))]},
        "SPLIT_K and PREFETCH_K are of few_tokens",
    ),
    "a prefetch of no line": (
        {"rows": [row("few_tokens", config=config_of(PREFETCH_K=32))]},
        "PREFETCH_K 0 or a power",
    ),
    "few tokens in a tall tile": (
        {"rows": [row("few_tokens", config=config_of(BLOCK_M=128))]},
        "takes BLOCK_M up to 64",
    ),
    "a split epilogue, gated": (
        {"rows": [row("gated_ffn", config=config_of(SPLIT_EPILOGUE=True))]},
        "no split epilogue",
    ),
    "half a row of partial sums": ({"rows": [row("linear_dact", config=config_of(BLOCK_M=16))]}, "multiple of 32"),
    "sizes that are none": ({"rows": [row(sizes=(0, 1, 1))]}, "sizes must be positive integers"),
    "no time": ({"rows": [row(us=-1)]}, "us must be a time in microseconds, got -1"),
    "torch for what it does not have": ({"rows": [row("ffn")]}, "torch has no ffn"),
    "a field missing": ({"rows": [row(config={"BLOCK_M": 64})]}, "config must have the fields BLOCK_K, BLOCK_M"),
    "a huge tile": ({"rows": [row(config=config_of(BLOCK_M=4096))]}, "BLOCK_M must be int from 16 to 256, got 4096"),
    "no power of two": ({"rows": [row(config=config_of(BLOCK_N=48))]}, "BLOCK_N must be a power of two, got 48"),
    "true for a number": ({"rows": [row(config=config_of(num_warps=True))]}, "num_warps must be int from 1 to 16"),
    "a number for true": ({"rows": [row(config=config_of(USE_TMA=1))]}, "USE_TMA must be bool"),
}


@pytest.mark.parametrize(("content", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_file_is_refused_and_a_shipped_one_ignored(content, message, write, on_a_gpu, monkeypatch, tmp_path):
    path = write([], name=_tuned.file_of(NAME).name)
    if isinstance(content, dict) and content.get("schema") != 2:
        content = json.loads(path.read_text()) | content
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message):
        tp.load_tuning(path)
    monkeypatch.setattr(_tuned, "FOLDER", tmp_path)
    with pytest.warns(UserWarning, match="is ignored, the tables choose") as warned:
        assert _configs.select("linear", of(1, 1), 1024, 1024, 1024).origin == "compiles"
    assert str(tmp_path) not in str(warned[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it says so once
        assert _configs.select("linear", of(1, 1), 2048, 1024, 1024).origin == "compiles"


def test_another_gpus_file_is_ignored(write, on_a_gpu, monkeypatch, tmp_path):
    write([row(config=config_of())], name=_tuned.file_of(NAME).name, device="NVIDIA H200")
    monkeypatch.setattr(_tuned, "FOLDER", tmp_path)
    with pytest.warns(UserWarning, match="measured on 'NVIDIA H200'"):
        assert _configs.select("linear", of(1, 1), 4096, 8192, 3584).origin == "compiles"


def test_measured_tiles_do_not_change_the_form(write, on_a_gpu):
    """528 tiles of 128×128, the tables' at this size, are one launch; as many tokens in 128×64 would be two."""
    M = 128 * MOST_WAVES["sm_90"] * PROCESSORS["sm_90"]
    operands = of(M, 64), of(128, 64), of(64, 128)
    assert forward_form(*operands, "gelu").form == SINGLE
    tp.load_tuning(write([row("ffn", (M, 128, 64), config_of(BLOCK_M=128, BLOCK_N=64))]))
    choice = forward_form(*operands, "gelu")
    launched = _launch.configuration("ffn", choice.config, M, 128, 64, *operands, of(M, 128), of(M, 64))
    assert (choice.form, launched.BLOCK_N) == (SINGLE, 64)


def test_every_field_has_its_range():
    checked = {field.name for field in fields(Config) if field.type is int}
    assert checked == set(_tuned._LIMITS)


def test_shipped_files_fit():
    paths = [*_tuned.FOLDER.glob("*.json")]
    if not paths:
        pytest.skip("no measurements are shipped yet")
    for path in paths:
        data = json.loads(path.read_text())
        assert path == _tuned.file_of(data["device"])
        for entry in data["rows"]:
            _tuned._measured(entry, data["device"], data["triton"], data["date"])


@pytest.fixture
def by_torch(monkeypatch):
    """All that was measured was torch's GEMM."""
    for kept in _launch._prepared:
        kept.cache_clear()
    measured = _tuned.Measured("", "", (1, 1, 1), None, "torch's GEMM, 10 µs")
    monkeypatch.setattr(_configs, "_measured", lambda *args: measured)
    yield
    for kept in _launch._prepared:
        kept.cache_clear()


@pytest.fixture
def gemms(monkeypatch):
    """Which of torch's GEMMs are called, and how often our kernel is launched."""
    found = []
    call = matmul.TorchGEMM.__call__

    def counted(self, *tensors):
        found.append((self.trans_a, self.trans_b, self.has_bias))
        call(self, *tensors)

    monkeypatch.setattr(matmul.TorchGEMM, "__call__", counted)
    return found


def test_plain_gemms_go_to_torch_where_it_was_faster(by_torch, gemms):
    a, w, b, dy = (randn(*s, dtype=torch.bfloat16, device="cpu") for s in ((40, 64), (48, 64), (48,), (40, 48)))
    exact = a.double() @ w.double().t() + b.double()
    eager = torch.nn.functional.linear(a, w, b)
    assert_accurate("y", linear(a, w, b), eager, exact)
    out = torch.empty(40, 48, dtype=torch.bfloat16)
    linear_into(out, a, w, b)
    assert_accurate("y", out, eager, exact)
    assert_accurate("dx", dgrad(dy, w), dy @ w, dy.double() @ w.double())
    assert_accurate("dw", wgrad(dy, a), dy.t() @ a, dy.double().t() @ a.double())
    assert gemms == [(False, True, True), (False, True, True), (False, False, False), (True, False, False)]
    # Not where the caller wants ours, names a configuration, or another dtype is stored than torch's GEMM would.
    linear(a, w, b, by_torch=False)
    dgrad(dy, w, by_torch=False)
    wgrad(dy, a, by_torch=False)
    linear(a, w, b, config=TINY)
    dgrad(dy, w, config=TINY)
    wgrad(dy, a, config=TINY)
    linear(a, w, b, torch.float32)
    matmul.wgrad_accumulate(torch.zeros(48, 64), dy, a)
    assert len(gemms) == 4


def test_the_form_follows_whose_gemm_it_is(by_torch, monkeypatch):
    """Partial sums in fp32 are no GEMM of torch's: Linear2 then waits for Linear1 as where nothing was measured."""
    args = [t.to(torch.bfloat16) for t in (torch.ones(80, 32), torch.ones(64, 32), torch.ones(32, 64))]
    x, w1, w2 = args
    monkeypatch.setitem(_configs.MOST_WAVES, "sm_90", 0)
    calls, second = [], forward.linear
    monkeypatch.setattr(forward, "linear", lambda *args, **kwargs: calls.append(kwargs) or second(*args, **kwargs))
    for out_dtype in (None, torch.bfloat16, torch.float32):
        ffn_forward(x, w1, None, w2, None, "gelu", "nothing", out_dtype)
    assert [call["dependent"] for call in calls] == [False, False, True]


def test_a_layer_whose_gemms_go_to_torch(by_torch, gemms, monkeypatch):
    """In training: out= and leaves that want gradients."""
    monkeypatch.setattr(_configs, "select", lambda *args: TINY)
    monkeypatch.setattr(_configs, "select_for_few_tokens", lambda *args: None)
    monkeypatch.setitem(_configs.MOST_WAVES, "sm_90", 0)
    layer = tp.TensorParallelFFN(64, 96, dtype=torch.bfloat16)
    x = torch.randn(40, 64, dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    assert gemms == [(False, True, True), (False, False, False), (True, False, False), (True, False, False)]
    with torch.no_grad():
        y = layer(x)
    torch.testing.assert_close(y, tp.reference.ffn_reference(x, *weights(layer)), rtol=0.02, atol=0.02)


def weights(layer):
    return layer.linear_fc1.weight, layer.linear_fc2.weight, layer.linear_fc1.bias, layer.linear_fc2.bias


def test_explain_names_what_torch_computes(on_a_gpu, by_torch, monkeypatch):
    choice = forward_form(of(8192, 8192), of(8192, 8192), of(8192, 8192), "gelu")
    assert choice.form == TWO
    assert "Linear2 by torch's GEMM, 10 µs" in choice.why
    explained = str(tp.explain((8192, 8192), 8192, arch="sm_90"))
    assert len([line for line in explained.splitlines() if "torch" in line and "10 µs" in line]) >= 4
    monkeypatch.setattr(_configs, "_measured", lambda *args: None)
    assert forward_form(of(8192, 8192), of(8192, 8192), of(8192, 8192), "gelu", "sm_90").form == DEPENDENT
