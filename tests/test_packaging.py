"""What gets installed: the kernels inside tpffn_triton, and nothing over Hugging Face's package `kernels`."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import tpffn_triton

pytestmark = pytest.mark.cpu_only

ROOT = Path(__file__).resolve().parent.parent
# Leftovers of builds would be packaged: setuptools reads the file list of an old *.egg-info.
NOT_SOURCE = (
    ".*_cache",
    ".cache",
    ".git",
    ".hypothesis",
    ".venv*",
    "*.egg-info",
    "__pycache__",
    "build",
    "dist",
)
# What bench/tune.py would write for some GPU.
MEASURED = "NVIDIA-Somewhere.json"
WHERE = """\
import json, kernels, tpffn_triton.kernels.linear_act as ours
print(json.dumps([kernels.__file__, ours.__file__, hasattr(kernels, "get_kernel")]))
"""


def run(*command: str, cwd: Path, path: Path | None = None) -> str:
    """Run python with these arguments and return its output; fails the test with all of it otherwise."""
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environ["PYTHONPATH"] = str(path)
    done = subprocess.run([sys.executable, *command], cwd=cwd, env=environ, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{command} in {cwd}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def imported(cwd: Path, path: Path | None = None) -> tuple[Path, Path]:
    """Import both packages in a new process; return the files of `kernels` and of our linear_act."""
    theirs, ours, has_api = json.loads(run("-c", WHERE, cwd=cwd, path=path).splitlines()[-1])
    assert theirs is not None, "`import kernels` found a bare folder, not Hugging Face's package"
    assert has_api
    return Path(theirs), Path(ours)


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """A folder with the sdist and the wheel, built from a copy: building leaves files in the source tree."""
    folder = tmp_path_factory.mktemp("packaging")
    shutil.copytree(ROOT, folder / "tree", symlinks=True, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    tuned = folder / "tree" / "kernels" / "tuned" / MEASURED
    tuned.parent.mkdir(exist_ok=True)
    tuned.write_text("{}")
    for kind in ("--sdist", "--wheel"):
        run(
            "-m",
            "build",
            "--no-isolation",
            kind,
            "--outdir",
            str(folder / "dist"),
            str(folder / "tree"),
            cwd=folder,
        )
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    return next(dist.glob("*.whl"))


@pytest.fixture(scope="module")
def theirs() -> importlib.metadata.Distribution:
    """Hugging Face's package as installed here."""
    try:
        return importlib.metadata.distribution("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.fail("Hugging Face's `kernels` is not installed beside ours: pip install -e '.[test]'", pytrace=False)


def check_wheel(wheel: Path) -> None:
    """Check what a wheel holds against the checkout."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert {name.split("/")[0] for name in names} == {
            "tpffn_triton",
            f"tpffn_triton-{tpffn_triton.__version__}.dist-info",
        }
        sources = {f"tpffn_triton/kernels/{path.name}": path for path in (ROOT / "kernels").glob("*.py")}
        assert sources
        sources |= {f"tpffn_triton/{path.name}": path for path in (ROOT / "tpffn_triton").glob("*.py")}
        assert not set(sources) - names
        for name, path in sources.items():
            assert archive.read(name) == path.read_bytes()
            assert not stat.S_ISLNK(archive.getinfo(name).external_attr >> 16)
        assert {"tpffn_triton/py.typed", f"tpffn_triton/kernels/tuned/{MEASURED}"} <= names
        (metadata_name,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(metadata_name).decode())
    assert metadata["Version"] == tpffn_triton.__version__
    needed = {line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line}
    assert {re.split(r"\W", line)[0] for line in needed} == {"numpy", "torch", "triton"}


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    check_wheel(wheel)


def test_the_sdist_builds_the_same_wheel(dist: Path, tmp_path: Path) -> None:
    """pip builds from the sdist where it finds no wheel; the symbolic link is gone by then."""
    sdist = next(dist.glob("*.tar.gz"))
    pip = ("-m", "pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation", "-w", str(tmp_path))
    run(*pip, str(sdist), cwd=tmp_path)
    check_wheel(next(tmp_path.glob("*.whl")))


def test_hugging_face_kernels_stays_intact(
    wheel: Path, theirs: importlib.metadata.Distribution, tmp_path: Path
) -> None:
    """Install our wheel over a copy of theirs: no file of theirs changes, and both import."""
    site = tmp_path / "site"
    hashes = {}
    for file in theirs.files or ():
        if file.hash is not None and file.parts[0] != "..":
            (site / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(str(file.locate()), site / file)
            hashes[file] = file.hash
    assert Path("kernels/__init__.py") in {Path(file) for file in hashes}
    # Without --upgrade pip leaves a folder alone that is already there, and could do no harm.
    pip = ("-m", "pip", "install", "-q", "--no-deps", "--no-index", "--upgrade", "--target", str(site))
    run(*pip, str(wheel), cwd=tmp_path)
    for file, recorded in hashes.items():
        digest = hashlib.new(recorded.mode, (site / file).read_bytes()).digest()
        assert base64.urlsafe_b64encode(digest).decode().rstrip("=") == recorded.value, f"{file} has changed"
    assert imported(tmp_path, path=site) == (
        site / "kernels" / "__init__.py",
        site / "tpffn_triton" / "kernels" / "linear_act.py",
    )


@pytest.mark.parametrize("where", ["checkout", "elsewhere"])
def test_the_editable_install_leaves_the_name_kernels_alone(
    where: str, theirs: importlib.metadata.Distribution, tmp_path: Path
) -> None:
    """In the checkout a folder `kernels` lies on sys.path before theirs: it must not be importable."""
    expected = (
        Path(str(theirs.locate_file("kernels/__init__.py"))),
        ROOT / "tpffn_triton/kernels/linear_act.py",
    )
    assert imported(ROOT if where == "checkout" else tmp_path) == expected
