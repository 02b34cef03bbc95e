"""Imports point one way, kernels → ops → functional → module; and other promises that the syntax can show.

Nothing is imported here: every check reads the syntax tree, so imports inside functions count as well.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu_only

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kernels", "tpffn_triton", "tests", "bench", "scripts", "examples")
# A module of tpffn_triton imports from earlier lines only.
LAYERS = (
    ("kernels",),
    ("interpreter", "group_store", "reference", "plan_records", "machines", "partitionings"),
    ("native", "collectives", "presets", "cost_model", "plan_schedule", "plan_report"),
    ("backends", "agreement", "regions", "plan_communication", "predict"),
    ("ops", "validation"),
    ("sharding", "passes", "plan"),
    ("sweep", "plan_comparison"),
    ("plan_command",),
    ("transforms", "mlp_twins"),
    ("functional", "partitioned", "megatron_options", "mlp_wiring"),
    ("module",),
    ("replicated_grads", "comparison", "explanation", "megatron_mlp", "mlp_halves", "tensor_parallel_mlp"),
    ("megatron", "parallel_style", "huggingface"),
    ("__init__", "__main__"),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
MAX_LINES = 400


def sources(folder: str) -> list[Path]:
    """Return the Python files under a folder of the checkout, without those behind symbolic links."""
    found = [
        Path(parent, name) for parent, _, names in os.walk(ROOT / folder) for name in names if name.endswith(".py")
    ]
    return sorted(found)


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield (level, module, name) of every import; `import a.b` has level 0 and name ""."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.level, node.module or "", alias.name) for alias in node.names)


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def show(path: Path, what: str) -> str:
    return f"{path.relative_to(ROOT)}: {what}"


def package_module(module: str, name: str) -> str:
    """Return the module of tpffn_triton that an import reaches; "__init__" for the package's names."""
    parts = [*module.split("."), name][1:]
    return parts[0] if parts[0] in RANK or (ROOT / "tpffn_triton" / f"{parts[0]}.py").exists() else "__init__"


def test_the_walk_finds_the_sources() -> None:
    """The checks below pass on an empty list."""
    assert ROOT / "kernels" / "linear_act.py" in sources("kernels")
    package = sources("tpffn_triton")
    assert ROOT / "tpffn_triton" / "functional.py" in package
    assert not [path for path in package if "kernels" in path.parts]


def test_kernels_import_only_torch_triton_and_each_other() -> None:
    wrong = []
    for path in sources("kernels"):
        for level, module, name in imports(path):
            full = f"{module}.{name}".strip(".")
            if level:
                target = ROOT / "kernels" / f"{(module or name).split('.')[0]}.py"
                if level > 1 or not target.exists():
                    wrong.append(show(path, f"{'.' * level}{full} is not a sibling"))
                continue
            root = module.split(".")[0]
            if root not in ("torch", "triton") and root not in sys.stdlib_module_names:
                wrong.append(show(path, f"imports {full}"))
            if is_in(full, "torch.distributed") or is_in(full, "torch.nn"):
                wrong.append(show(path, f"imports {full}: process groups and modules belong above"))
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.distributed", "torch.nn"):
                wrong.append(show(path, f"line {node.lineno} uses {ast.unparse(node)}"))
    assert not wrong


def test_the_layers_list_the_modules_of_the_package() -> None:
    folder = ROOT / "tpffn_triton"
    modules = {path.relative_to(folder).parts[0].removesuffix(".py") for path in sources("tpffn_triton")}
    assert {*modules, "kernels"} == set(RANK), f"bring LAYERS in {Path(__file__).name} up to date"


def test_the_package_imports_from_lower_layers_only() -> None:
    wrong = []
    for path in sources("tpffn_triton"):
        own = path.relative_to(ROOT / "tpffn_triton").parts[0].removesuffix(".py")
        for level, module, name in imports(path):
            if level:
                wrong.append(show(path, f"relative import of {module or name}: write tpffn_triton.…"))
            elif is_in(module, "tpffn_triton"):
                target = package_module(module, name)
                if RANK.get(target, -1) >= RANK.get(own, len(LAYERS)):
                    wrong.append(show(path, f"imports {target}, which is not in a lower layer"))
    assert not wrong


def test_the_package_imports_no_tests_and_no_benchmarks() -> None:
    beside = {path.stem for folder in ("tests", "bench", "scripts", "examples") for path in sources(folder)}
    wrong = [
        show(path, f"imports {module}")
        for folder in ("kernels", "tpffn_triton")
        for path in sources(folder)
        for level, module, _ in imports(path)
        if level == 0 and module.split(".")[0] in {"tests", "bench", "scripts", "examples"} | beside
    ]
    assert not wrong


def test_nobody_imports_a_top_level_kernels() -> None:
    """That is Hugging Face's package; ours is tpffn_triton.kernels."""
    wrong = [
        show(path, f"imports {module}")
        for folder in FOLDERS
        for path in sources(folder)
        for level, module, _ in imports(path)
        if level == 0 and is_in(module, "kernels")
    ]
    assert not wrong


def test_the_package_reads_no_environment_variable() -> None:
    """What the kernels compute follows from their arguments; Triton reads TRITON_INTERPRET by itself."""
    readers = {"environ", "environb", "getenv", "getenvb"}
    wrong = []
    for path in (*sources("kernels"), *sources("tpffn_triton")):
        wrong += [show(path, f"imports {name}") for _, module, name in imports(path) if name in readers]
        wrong += [
            show(path, f"line {node.lineno} reads {ast.unparse(node)}")
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Attribute) and node.attr in readers
        ]
    assert not wrong


def test_kernels_do_not_count_on_every_processor() -> None:
    """One program a tile: a collective that holds some processors delays a few tiles, not a wave that waits for all."""
    wrong = [
        show(path, f"line {node.lineno} loops over programs")
        for path in sources("kernels")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute) and node.attr in ("num_programs", "multi_processor_count")
    ]
    assert not wrong


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for folder in FOLDERS
        for path in sources(folder)
    }
    assert not {path: lines for path, lines in lengths.items() if lines > MAX_LINES}


def test_kernels_are_a_symlinked_folder_without_init() -> None:
    """With an __init__.py, `import kernels` in the checkout would give ours instead of Hugging Face's."""
    link = ROOT / "tpffn_triton" / "kernels"
    assert link.is_symlink()
    assert os.readlink(link) == "../kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()
