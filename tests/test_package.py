"""What is built is all of the package and nothing but the package."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
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
    """site-packages of an environment with the wheel in it, which finds other packages in the present one."""
    venv = built / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(venv / "bin/python")]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", *built.glob("*.whl")], check=True)
    found = next(venv.glob("lib/python3*/site-packages"))
    # A path file adds that folder alone, without the path file in it that leads to this tree.
    (found / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return found


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
    assert {path.name.partition("-")[0] for path in site.iterdir()} == {"t3c_compile", "others.pth"}


def test_the_command_runs_where_it_is_installed(site: Path) -> None:
    """It finds its targets, and says the version of the wheel."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def printed(*command: str) -> str:
        done = subprocess.run(command, cwd=site.parents[2], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    python, command = (str(site.parents[2] / "bin" / name) for name in ("python", "t3c-compile"))
    (wheel,) = (path.name.removesuffix(".dist-info") for path in site.glob("*.dist-info"))
    assert printed(command, "--version").replace(" ", "-").replace("t3c-", "t3c_") == wheel
    assert "ethos-u55-128" in {row["target"] for row in json.loads(printed(command, "targets", "--json"))}
    assert Path(printed(python, "-c", "import t3c_compile; print(t3c_compile.__file__)")).is_relative_to(site)


def test_import_loads_neither_torch_nor_tvm(site: Path) -> None:
    code = "import sys, t3c_compile; print(t3c_compile.__file__, sys.modules.keys() & {'torch', 'tvm'})"
    env = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=site, capture_output=True, text=True)
    assert done.stdout.split() == [str(site / "t3c_compile/__init__.py"), "set()"], done.stderr
