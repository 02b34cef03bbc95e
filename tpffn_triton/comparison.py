"""Compare what ranks hold, on demand: the FFN modules of a model."""

from torch import nn

from tpffn_triton.agreement import compare, contents
from tpffn_triton.group_store import Facts
from tpffn_triton.module import TensorParallelFFN


def compare_ranks(module: nn.Module) -> None:
    """Compare every TensorParallelFFN in module with those of the other ranks of its group, by name: settings, shapes,
    dtypes, the bits of linear_fc2.bias, which is replicated, and whether each parameter is finite. Collective.

    Costs one exchange of text for each group and one reading of each parameter; a GPU is waited for.

    Raises: ValueError: ranks differ; says in what, and what each has. CollectiveError: a rank did not come within the
    group's timeout.
    """
    groups: dict = {}
    for name, layer in module.named_modules():
        if isinstance(layer, TensorParallelFFN) and layer.tp_group is not None:
            facts = groups.setdefault(layer.tp_group, {"layers": ""})
            facts["layers"] += f" {name or type(layer).__name__}"
            facts |= _facts(name, layer)
    for group, facts in groups.items():
        facts["layers"] = "FFN layers:" + facts["layers"]
        compare(group, facts)


def _facts(name: str, layer: TensorParallelFFN) -> Facts:
    parameters = {f"{name}.{own}".lstrip("."): p for own, p in layer.named_parameters()}
    shapes = ", ".join(f"{own} {list(p.shape)} in {p.dtype} on {p.device.type}" for own, p in parameters.items())
    replicated = tuple(own for own in parameters if own.endswith("linear_fc2.bias"))
    settings = layer.extra_repr().replace(f"rank={layer.rank}, ", "")
    return {f"{name} settings": f"{settings}; {shapes}"} | contents(parameters, replicated)
