"""What an MLP computes is found by its values, whatever its names; and nothing that would be lost is passed over."""

import copy

import pytest
import torch
import torch.nn.functional as F
from mlp_modules import ConvMLP, GatedMLP, PlainMLP, build
from torch import nn

from tpffn_triton.huggingface import parallelize
from tpffn_triton.kernels.activations import ACTIVATIONS, GATED_ACTIVATIONS
from tpffn_triton.mlp_wiring import wiring_of
from tpffn_triton.tensor_parallel_mlp import TensorParallelMLP

pytestmark = pytest.mark.cpu_only
H, FFN = 8, 24
F_SMALL = 10  # mlp_twins.SMALL_F


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_told_apart(activation, device):
    found = wiring_of(build(H, FFN, activation).to(device))
    names = ("gate_proj", "up_proj") if activation in GATED_ACTIVATIONS else ("fc1",)
    assert (found.activation, found.fc1, found.hidden_size, found.ffn_hidden_size) == (activation, names, H, FFN)
    assert found.fc2 == ("down_proj" if activation in GATED_ACTIVATIONS else "fc2")
    assert found.dropouts == (() if activation in GATED_ACTIVATIONS else ("dropout",)), "p may be raised later"


def test_equal_sizes_leave_the_order_to_the_values():
    """With F = H every order of the linears fits; only one computes the same."""
    plain, gated = PlainMLP(H, H, "gelu"), GatedMLP(H, H, "swiglu")
    assert (wiring_of(plain).fc1, wiring_of(plain).fc2) == (("fc1",), "fc2")
    assert (wiring_of(gated).fc1, wiring_of(gated).fc2) == (("gate_proj", "up_proj"), "down_proj")


def test_nested_names_sequences_and_dropout_behind():
    assert wiring_of(PlainMLP(H, FFN, "relu", dropout=0.1)).dropouts == ("dropout",)
    sequence = nn.Sequential(nn.Sequential(nn.Linear(H, FFN), nn.SiLU()), nn.Linear(FFN, H), nn.Dropout(0.2))
    found = wiring_of(sequence)
    assert (found.activation, found.fc1, found.fc2, found.dropouts) == ("silu", ("0.0",), "1", ("2",))
    assert wiring_of(ConvMLP(H, FFN, "gelu_tanh")).activation == "gelu_tanh"


def dropout_by_function(m, x):
    return F.dropout(m.fc2(F.gelu(m.fc1(x))), 0.5, m.training)


def test_the_module_is_untouched():
    mlp, other = PlainMLP(H, FFN, "gelu", dropout=0.1), Other(dropout_by_function)
    before, state = copy.deepcopy(mlp.state_dict()), torch.get_rng_state()
    wiring_of(mlp)
    with pytest.raises(ValueError, match="computes something else in training"):
        wiring_of(other)
    assert mlp.training
    assert mlp.dropout.p == 0.1
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[name]) for name, t in mlp.state_dict().items())


class Other(PlainMLP):
    """The plain MLP with another function of (self, x)."""

    def __init__(self, function, H=H, FFN=FFN, **parts):
        super().__init__(H, FFN, "gelu")
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


class OtherGated(GatedMLP):
    def __init__(self, function):
        super().__init__(H, FFN, "swiglu")
        self.function = function

    def forward(self, x):
        return self.function(self, x)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return -dy


SOMETHING_ELSE = {
    "quick gelu": Other(lambda m, x: m.fc2((z := m.fc1(x)) * torch.sigmoid(1.702 * z))),
    "leaky relu": Other(lambda m, x: m.fc2(F.leaky_relu(m.fc1(x)))),
    "a factor": Other(lambda m, x: 2 * m.fc2(F.gelu(m.fc1(x)))),
    "a factor inside": Other(lambda m, x: m.fc2(0.999 * F.gelu(m.fc1(x)))),
    "an offset of 1e-6": Other(lambda m, x: m.fc2(F.gelu(m.fc1(x)) + 1e-6)),
    "a residual connection": Other(lambda m, x: x + m.fc2(F.gelu(m.fc1(x)))),
    "a clamp at 100": Other(lambda m, x: m.fc2(F.gelu(m.fc1(x)).clamp(max=100))),
    "a norm without parameters": Other(lambda m, x: m.fc2(F.layer_norm(F.gelu(m.fc1(x)), [F_SMALL]))),
    "no activation": Other(lambda m, x: m.fc2(m.fc1(x))),
    "one linear twice": Other(lambda m, x: m.fc2(F.gelu(m.fc1(m.fc2(F.gelu(m.fc1(x))))))),
    "rounding in between": Other(lambda m, x: m.fc2(F.gelu(m.fc1(x)).float().double())),
    "a result in fp32": Other(lambda m, x: m.fc2(F.gelu(m.fc1(x))).float()),
    "a tuple": Other(lambda m, x: (m.fc2(F.gelu(m.fc1(x))), None)),
    "one token less": Other(lambda m, x: m.fc2(F.gelu(m.fc1(x)))[1:]),
    "mixing tokens": Other(lambda m, x: m.fc2(F.gelu(m.fc1(x.flip(0))))),
    "mixing tokens of the other dim": Other(lambda m, x: m.fc2(F.gelu(m.fc1(x.cumsum(1))))),
    "the first token alone": Other(lambda m, x: m.fc2(F.gelu(m.fc1(x[:, :1])))),
    "a clamp at 65504": Other(lambda m, x: m.fc2(F.gelu(m.fc1(x)).clamp(max=65504))),
    "no gradient of x": Other(lambda m, x: m.fc2(F.gelu(m.fc1(x.detach())))),
    "no gradient of the first linear": Other(lambda m, x: m.fc2(F.gelu(m.fc1(x).detach()))),
    "no gradient": Other(lambda m, x: m.fc2(F.gelu(m.fc1(x))).detach()),
    "another gradient": Other(lambda m, x: m.fc2(F.gelu(m.fc1(Reversed.apply(x))))),
    "gate and up added": OtherGated(lambda m, x: m.down_proj(F.silu(m.gate_proj(x)) + m.up_proj(x))),
    "up activated too": OtherGated(lambda m, x: m.down_proj(F.silu(m.gate_proj(x)) * F.silu(m.up_proj(x)))),
    "up plus one": OtherGated(lambda m, x: m.down_proj(F.silu(m.gate_proj(x)) * (m.up_proj(x) + 1))),
    "up not used": OtherGated(lambda m, x: m.down_proj(F.silu(m.gate_proj(x)))),
}


@pytest.mark.parametrize("what", SOMETHING_ELSE)
def test_something_else_is_refused(what):
    with pytest.raises(ValueError, match=r"does not compute fc2\(act\(fc1\(x\)\)\)"):
        wiring_of(SOMETHING_ELSE[what])


def hooked(module):
    module.register_forward_hook(lambda *_: None)
    return module


def before_hooked(module):
    module.register_forward_pre_hook(lambda *_: None)
    return module


def with_forward(module):
    module.forward = module.forward
    return module


def uneven_bias():
    mlp = GatedMLP(H, FFN, "swiglu")
    mlp.up_proj = nn.Linear(H, FFN, bias=False)
    return mlp


def quantized():
    mlp = PlainMLP(H, FFN, "gelu")
    mlp.fc1.weight = nn.Parameter(torch.zeros(FFN, H, dtype=torch.int8), requires_grad=False)
    return mlp


def converted(change, *arguments):
    mlp = PlainMLP(H, FFN, "gelu")
    change(mlp, *arguments)
    return mlp


def tied():
    mlp = GatedMLP(H, FFN, "swiglu")
    mlp.up_proj.weight = mlp.gate_proj.weight
    return mlp


class Packed(torch.Tensor):
    """A tensor that is not what it looks like, as quantized ones are."""


def packed(mlp):
    mlp.fc1.weight = nn.Parameter(torch.randn(FFN, H).as_subclass(Packed))


def not_copyable():
    mlp = PlainMLP(H, FFN, "gelu")
    mlp.generator = (each for each in ())
    return mlp


LOST = {
    "dropout before its second linear, which has no place here: drop .p=0.1.": lambda: Other(
        lambda m, x: m.fc2(m.drop(F.gelu(m.fc1(x)))), drop=nn.Dropout(0.1)
    ),
    r"which has no place here: 1 \(p=0.5\)|here: drop \(p=0.2\)": lambda: Other(
        lambda m, x: m.drop(m.fc2(m.drop(F.gelu(m.fc1(x))))), drop=nn.Dropout(0.2)
    ),
    "fc1.weight has hooks": lambda: converted(lambda mlp: mlp.fc1.weight.register_hook(lambda grad: None)),
    "fc1.bias has hooks": lambda: converted(
        lambda mlp: mlp.fc1.bias.register_post_accumulate_grad_hook(lambda parameter: None)
    ),
    r"fc1.weight has the shape \[0\]": lambda: converted(
        lambda mlp: setattr(mlp.fc1, "weight", nn.Parameter(torch.empty(0)))
    ),
    "net.0 is fc1 as well|fc1 is net.0 as well": lambda: converted(
        lambda mlp: setattr(mlp, "net", nn.Sequential(mlp.fc1, mlp.fc2))
    ),
    "computes something else in training": lambda: Other(dropout_by_function),
    "fc1 has hooks": lambda: Other(lambda m, x: m.fc2(F.gelu(m.fc1(x))), fc1=hooked(nn.Linear(H, FFN))),
    "act has hooks": lambda: Other(lambda m, x: m.fc2(m.act(m.fc1(x))), act=hooked(nn.GELU())),
    "fc2.forward has been replaced": lambda: Other(
        lambda m, x: m.fc2(F.gelu(m.fc1(x))), fc2=with_forward(nn.Linear(FFN, H))
    ),
    "its forward has been replaced": lambda: with_forward(PlainMLP(H, FFN, "gelu")),
    "norm .LayerNorm. with weight, bias": lambda: Other(
        lambda m, x: m.fc2(F.gelu(m.fc1(m.norm(x)))), norm=nn.LayerNorm(H)
    ),
    "lead from H to F and back": uneven_bias,
    "fc1.weight is quantized: Parameter of torch.int8": quantized,
    "fc1.weight is quantized: Packed of torch.float32": lambda: converted(packed),
    "fc1.weight is quantized: Parameter of torch.float8_e4m3fn": lambda: converted(
        lambda mlp: mlp.fc1.to(torch.float8_e4m3fn)
    ),
    "gate_proj.weight as well|up_proj.weight as well": tied,
    "more than one dtype: fc1 torch.float32, fc2 torch.bfloat16": lambda: converted(lambda mlp: mlp.fc2.bfloat16()),
    "more than one device: fc1 cpu, fc2 meta": lambda: converted(lambda mlp: mlp.fc2.to("meta")),
    "cannot be copied to be looked at": not_copyable,
    "has 3 linears|lead from H to F": lambda: Other(lambda m, x: m.fc3(m.fc2(F.gelu(m.fc1(x)))), fc3=nn.Linear(H, H)),
    "has 1 linears": lambda: nn.Sequential(nn.Linear(H, FFN), nn.GELU()),
    "has 0 linears": lambda: nn.GELU(),
    "cannot be called with one tensor": lambda: Other(lambda m, x: m.fc2(F.gelu(m.fc1(x, 1)))),
}


@pytest.mark.parametrize("message", LOST)
def test_what_would_be_lost_is_refused(message):
    with pytest.raises(ValueError, match=message):
        wiring_of(LOST[message]())


class Intermediate(nn.Module):
    def __init__(self, act=F.gelu, dropout=0.0):
        super().__init__()
        self.dense, self.act, self.dropout = nn.Linear(H, FFN), act, nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.act(self.dense(x)))


class Output(nn.Module):
    def __init__(self, twice=1):
        super().__init__()
        self.dense, self.LayerNorm, self.dropout = nn.Linear(FFN, H), nn.LayerNorm(H), nn.Dropout(0.1)
        self.twice = twice

    def forward(self, hidden, x):
        return self.LayerNorm(self.dropout(self.twice * self.dense(hidden)) + x)


class Layer(nn.Module):
    """A layer of BERT's family without its attention."""

    def __init__(self, intermediate=None, output=None, between=lambda hidden: hidden):
        super().__init__()
        self.intermediate, self.output = intermediate or Intermediate(), output or Output()
        self.attention = nn.Linear(H, H)
        self.between = between

    def feed_forward_chunk(self, x):
        return self.output(self.between(self.intermediate(x)), x)

    def forward(self, x):
        return self.feed_forward_chunk(self.attention(x))


class Whole(Layer):
    """A layer that calls its halves in forward, as ViT did."""

    feed_forward_chunk = property()  # as if there was none

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, *args):
        return self.function(self, x, *args)


def test_hooks_of_the_module_itself_stay_and_do_not_see_the_search():
    mlp, seen = PlainMLP(H, FFN, "gelu"), []
    mlp.register_forward_hook(lambda _, inputs, y: seen.append(y) or 2 * y)
    parallelize(nn.Sequential(mlp))
    assert not seen
    mlp(torch.randn(3, H))
    assert len(seen) == 1


def test_halves_may_be_called_by_forward():
    layer = Whole(lambda m, x: (m.output(m.intermediate(y := m.attention(x)), y),)).eval()
    x = torch.randn(5, 3, H)
    (right,) = layer(x)
    assert parallelize(nn.Sequential(layer)).replaced[0].activation == "gelu"
    torch.testing.assert_close(layer(x)[0], right)


def test_halves_are_found_and_the_rest_stays():
    """Whatever comes behind the second linear in its module acts as before, a factor included; so does dropout."""
    for output in (Output(), Output(twice=2)):
        layer = Layer(Intermediate(F.relu), output).eval()
        x = torch.randn(5, 3, H)
        right = layer(x)
        report = parallelize(nn.Sequential(layer))
        assert [(r.name, r.kind, r.activation) for r in report.replaced] == [("0", "Layer", "relu")]
        assert type(layer.intermediate) is TensorParallelMLP
        torch.testing.assert_close(layer(x), right)
        twin = copy.deepcopy(layer)
        with torch.no_grad():
            twin.output.dense.weight.zero_()
        assert not torch.allclose(twin(x), right), "a copy has its own second linear"
        torch.testing.assert_close(layer(x), right)
        assert not torch.equal(layer.train()(x), layer(x))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Layer(Intermediate(dropout=0.1)), "dropout before its second linear"),
        (Layer(Intermediate(torch.tanh)), "does not compute output"),
        (Layer(between=lambda hidden: 2 * hidden), "changes what its intermediate returns"),
        (Layer(between=lambda hidden: hidden.clamp(max=50)), "changes what its intermediate returns"),
        (Layer(between=nn.Tanh()), "changes what its intermediate returns"),
        (Layer(between=nn.Dropout(0.5)), "changes what its intermediate returns"),
        (Layer(hooked(Intermediate())), "intermediate has hooks"),
        (Layer(output=before_hooked(Output())), "output has hooks before its forward"),
        (Layer(output=hooked(Output())), None),
        (Layer(nn.Sequential(nn.Linear(H, FFN), nn.Linear(FFN, FFN))), "has 2 linears in intermediate, not one"),
        (Whole(lambda m, x: m.output(2 * m.intermediate(x), x)), "changes what its intermediate returns"),
        (
            Whole(lambda m, x: m.output(F.dropout(m.intermediate(x), 0.5, m.training), x)),
            "changes what its intermediate returns",
        ),
        (Whole(lambda m, x: m.output(m.intermediate(y := x[0]), y)), "does not compute .* of all tokens"),
        (Whole(lambda m, x: x), "changes what its intermediate returns"),
        (Whole(lambda m, x, mask: m.output(m.intermediate(x), x)), "cannot be called with one tensor"),
    ],
)
def test_halves_of_something_else_are_left(layer, message):
    if message is None:  # hooks of the halves themselves are still called
        assert parallelize(nn.Sequential(layer)).replaced
        return
    before = dict(layer.named_modules())
    with pytest.raises(ValueError, match=f"found no MLP that can be replaced\n  0 .*{message}"):
        parallelize(nn.Sequential(layer))
    assert dict(layer.named_modules()) == before
