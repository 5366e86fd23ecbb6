"""Build build/arm64-root: an arm64 Python with TVM's runtime, for t3c_compile.qemu to run under QEMU.

Debian's arm64 packages are unpacked into a folder; the system's own packages and architectures stay as
they are.
"""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from t3c_compile import qemu

REPO = Path(__file__).resolve().parent.parent
RECIPE = 1  # raise it when this file builds something else, so that old roots are rebuilt
DEBS = ["python3-minimal", "libpython3-stdlib", "libstdc++6"]
NOT_NEEDED_DEBS = ("dpkg_", "tar_", "media-types_", "readline-common_")
WHEELS = ["apache-tvm", "apache-tvm-ffi", "ml_dtypes", "numpy", "typing_extensions"]
PLATFORMS = ["manylinux_2_28_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64"]
# What the runtime never opens; the compiler alone is 250 MB.
TRIM = ["usr/share", "site/bin", "site/tvm/lib/libtvm_compiler.so", "site/tvm/3rdparty", "site/tvm/src"]
SMOKE = "import sys, numpy, tvm.runtime.vm; print(sys.version.split()[0], numpy.__version__, tvm.__version__)"


def say(text: str) -> None:
    print(f"arm64-root: {text}", flush=True)


def run(*args: str, env: dict[str, str] | None = None) -> str:
    """Run a command; its output is shown only when it fails."""
    done = subprocess.run(args, env=os.environ | (env or {}), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"arm64-root: failed: {' '.join(args)}\n{done.stdout}{done.stderr}")
    return done.stdout


def ensure_qemu() -> None:
    if qemu.emulator():
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise SystemExit(f"arm64-root: {qemu.unavailable()}")
    say("installing qemu-user")
    run("apt-get", "update")
    run("apt-get", "install", "-y", "--no-install-recommends", "qemu-user")


def debian_sources() -> list[str]:
    """The Debian mirrors this system already uses, as lines of a sources.list."""
    if not shutil.which("apt-get"):
        raise SystemExit("arm64-root: apt-get is missing; the arm64 Python is made of Debian packages")
    query = ["apt-get", "indextargets", "Created-By: Packages", "Origin: Debian", "Component: main"]
    query += ["--format", "$(REPO_URI) $(RELEASE) main"]
    lines = run(*query).splitlines()
    if not lines and os.geteuid() == 0:  # a fresh machine has no package lists yet
        run("apt-get", "update")
        lines = run(*query).splitlines()
    if not lines:
        raise SystemExit("arm64-root: no Debian mirror in apt's lists; run apt-get update on a Debian system")
    keyring = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
    options = f"[signed-by={keyring}] " if keyring.exists() else ""
    return sorted({f"deb {options}{line}" for line in lines})


def unpack_debian(root: Path) -> None:
    """Let a private apt, which knows of arm64 only and of nothing installed, fetch Python."""
    apt = root / "apt"
    for folder in ("state/lists/partial", "cache/archives/partial"):
        (apt / folder).mkdir(parents=True)
    (apt / "status").touch()
    (apt / "sources.list").write_text("\n".join(debian_sources()) + "\n")
    (apt / "apt.conf").write_text(
        f'Dir::Etc::sourcelist "{apt}/sources.list";\n'
        'Dir::Etc::sourceparts "/dev/null";\n'
        f'Dir::State "{apt}/state";\n'
        f'Dir::State::status "{apt}/status";\n'
        f'Dir::Cache "{apt}/cache";\n'
        'APT::Architecture "arm64";\n'
        'APT::Architectures "arm64";\n'
        'APT::Sandbox::User "root";\n'
        'Acquire::Languages "none";\n'
    )
    config = {"APT_CONFIG": f"{apt}/apt.conf"}
    run("apt-get", "update", env=config)
    run("apt-get", "install", "-y", "--download-only", "--no-install-recommends", *DEBS, env=config)
    debs = [p for p in sorted(apt.glob("cache/archives/*.deb")) if not p.name.startswith(NOT_NEEDED_DEBS)]
    say(f"unpacking {len(debs)} Debian packages")
    for deb in debs:
        run("dpkg-deb", "-x", str(deb), str(root))
    if not (root / "lib").exists():  # Debian 13 and later ship everything under /usr
        (root / "lib").symlink_to("usr/lib")
    shutil.rmtree(apt)


def pins() -> list[str]:
    """The wheels, at the versions constraints.txt gives."""
    lines = (REPO / "constraints.txt").read_text().splitlines()
    versions = dict(line.split("==") for line in lines if "==" in line)
    return [f"{name}=={versions[name]}" for name in WHEELS]


def unpack_wheels(root: Path) -> None:
    version = (root / "usr/bin/python3").readlink().name.removeprefix("python")
    if not re.fullmatch(r"3\.\d+", version):
        raise SystemExit(f"arm64-root: cannot tell the Python version from {version!r}")
    say(f"unpacking aarch64 wheels for Python {version}: {', '.join(pins())}")
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps", "--no-compile"]
    kind = ["--only-binary=:all:", "--implementation=cp", f"--python-version={version}"]
    kind += [f"--platform={platform}" for platform in PLATFORMS]
    run(*pip, *kind, f"--target={root}/site", *pins())


def build(root: Path) -> None:
    stamp = json.dumps({"recipe": RECIPE, "wheels": pins()})
    stamp_file = root / "t3c-arm64.json"
    if stamp_file.exists() and stamp_file.read_text() == stamp:
        say(f"{root} is up to date")
        return
    say(f"building {root}")
    new, old = (root.with_name(f"{root.name}.{word}") for word in ("new", "old"))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir()
    unpack_debian(new)
    unpack_wheels(new)
    for path in (new / name for name in TRIM):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    # The first run proves that it works, and leaves compiled modules behind: later runs start in a second.
    os.environ["T3C_ARM64_ROOT"] = str(new)
    done = qemu.run_python(["-c", SMOKE])
    if done.returncode:
        raise SystemExit(f"arm64-root: the new root does not run:\n{done.stdout}{done.stderr}")
    say("Python {}, numpy {}, tvm {} run under QEMU".format(*done.stdout.split()))
    (new / stamp_file.name).write_text(stamp)
    if root.exists():
        root.rename(old)
    new.rename(root)
    shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    root = Path(os.environ.get("T3C_ARM64_ROOT") or REPO / "build/arm64-root").absolute()
    root.parent.mkdir(parents=True, exist_ok=True)
    with (root.parent / f".{root.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs at once build it once
        ensure_qemu()
        build(root)


if __name__ == "__main__":
    main()
