"""What is built is all of the package and nothing but the package."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
# Where each folder of the tree goes in the installed package.
PLACES = {"t3c_compile": "t3c_compile", "passes": "t3c_compile/passes", "backends": "t3c_compile/backends"}


def package_files() -> dict[str, str]:
    """Every file of the package: its path in the tree, and where it is installed."""
    found = {}
    for folder, place in PLACES.items():
        for path in (REPO / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".md":
                found[str(path.relative_to(REPO))] = f"{place}/{path.relative_to(REPO / folder)}"
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel built from that sdist."""
    folder = tmp_path_factory.mktemp("package")
    # A copy, because a build leaves files behind, and old ones would find their way into the new archives.
    left_out = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*.t3c")
    shutil.copytree(REPO, folder / "source", ignore=left_out)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(folder / "source")]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def site(built: Path) -> Path:
    """site-packages of an otherwise empty environment with the wheel in it."""
    venv = built / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(venv / "bin/python")]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", *built.glob("*.whl")], check=True)
    return next(venv.glob("lib/python3*/site-packages"))


def test_wheel_holds_every_file(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == set(package_files().values())
    for subpackage in ("", "passes/", "passes/ops/", "backends/", "backends/tvm/", "backends/tvm/kernels/"):
        assert f"t3c_compile/{subpackage}__init__.py" in names
    assert "t3c_compile/py.typed" in names


def test_sdist_holds_every_file(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {*package_files(), "LICENSE", "README.md", "pyproject.toml"} <= names


def test_only_the_package_is_installed(site: Path) -> None:
    assert {path.name.partition("-")[0] for path in site.iterdir()} == {"t3c_compile"}
    assert (site.parents[2] / "bin/t3c-compile").exists()


def test_import_loads_neither_torch_nor_tvm(site: Path) -> None:
    code = "import sys, t3c_compile; print(t3c_compile.__file__, sys.modules.keys() & {'torch', 'tvm'})"
    env = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=site, capture_output=True, text=True)
    assert done.stdout.split() == [str(site / "t3c_compile/__init__.py"), "set()"], done.stderr
