"""What an installation promises: few dependencies, pinned ones, two commands, and a CI that runs them."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import flash_moe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")

# Hidden as if never installed: a finder that raised instead would also break find_spec, which is how one asks.
HIDE = """
import sys
class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {hidden!r} else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
assert not set({hidden!r}) & set(sys.modules)
"""
OPTIONAL = ("triton", "numpy", "typer", "rich", "matplotlib", "safetensors", "transformers")
# torch works without numpy and says so once.
WARNINGS = ("-W", "error", "-W", "ignore:Failed to initialize NumPy:UserWarning")
USE_ON_CPU = """
import torch, flash_moe
config = flash_moe.FlashMoEConfig(hidden_size=8, intermediate_size=4, num_experts=9, num_experts_per_tok=2)
y, router_logits = flash_moe.FlashMoE(config)(torch.randn(2, 3, 8))
y.sum().backward()
assert y.shape == (2, 3, 8) and router_logits.shape == (2, 6, 3)
"""


def run_without(hidden, code):
    """Run ``code`` in a fresh process that has no GPU and none of the packages in ``hidden``."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *WARNINGS, "-c", HIDE.format(hidden=hidden) + code]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("code", ["import flash_moe", USE_ON_CPU], ids=["import", "use"])
def test_package_needs_nothing_but_torch(code):
    done = run_without(OPTIONAL, code)
    assert done.returncode == 0, done.stderr
    assert not done.stderr


@pytest.mark.parametrize("package", OPTIONAL)
def test_hidden_packages_are_missing(package):
    done = run_without((package,), f"import {package}")
    assert done.returncode != 0
    assert f"No module named '{package}'" in done.stderr


def test_import_test_can_fail():
    done = run_without(("triton",), "import flash_moe.ops._triton.math")
    assert done.returncode != 0
    assert "No module named 'triton'" in done.stderr


def test_asking_for_triton_says_what_to_install():
    ask = "x = torch.ones(2, 4); flash_moe.flash_mlp(x, x, x, x.t(), backend='triton')"
    done = run_without(("triton",), f"import torch, flash_moe; {ask}")
    message = "backend: expected torch or reference, since Triton cannot run here; got 'triton': triton is not inst"
    assert message in done.stderr


def test_command_line_says_what_to_install():
    done = run_without(("typer",), "from flash_moe.cli import main; main()")
    assert done.returncode not in (0, None)
    assert "flash_moe[train]" in done.stderr
    assert "Traceback" not in done.stderr


def test_version_is_the_same_everywhere():
    assert PROJECT["version"] == flash_moe.__version__


def test_entry_point_exists():
    module, _, function = PROJECT["scripts"]["flash-moe"].partition(":")
    assert callable(getattr(__import__(module, fromlist=[function]), function))


def pins():
    """The requirements of constraints.txt, several for a name where the marker decides, by canonical name."""
    found = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            found.setdefault(canonicalize_name(pin.name), []).append(pin)
    return found


def applies(requirement, python, extra=""):
    environment = {"python_version": python, "python_full_version": f"{python}.9", "extra": extra}
    return requirement.marker is None or requirement.marker.evaluate(environment)


def asked_for():
    groups = [PROJECT["dependencies"], PYPROJECT["build-system"]["requires"]]
    groups += PROJECT["optional-dependencies"].values()
    requirements = [Requirement(text) for group in groups for text in group]
    return [requirement for requirement in requirements if requirement.name != "flash_moe"]


@pytest.mark.parametrize("python", PYTHONS)
def test_every_dependency_is_pinned_once_to_a_version_it_accepts(python):
    for requirement in asked_for():
        if not applies(requirement, python):
            continue
        valid = [pin for pin in pins().get(canonicalize_name(requirement.name), []) if applies(pin, python)]
        assert len(valid) == 1, f"{requirement} on Python {python}: {len(valid)} pins in constraints.txt"
        (specifier,) = valid[0].specifier
        assert specifier.operator == "=="
        assert requirement.specifier.contains(specifier.version), f"{requirement}: pinned to {specifier.version}"


def test_every_pin_is_exact():
    for name, choices in pins().items():
        for pin in choices:
            assert [specifier.operator for specifier in pin.specifier] == ["=="], name


def test_what_the_dependencies_need_is_pinned_too():
    """Walks the installed packages as far as they are the pinned ones: in the Makefile's environment, all of them."""
    known, waiting, seen = pins(), [requirement.name for requirement in asked_for()], set()
    while waiting:
        name = canonicalize_name(waiting.pop())
        # torch pins its CUDA packages itself.
        if name in seen or name.startswith(("nvidia-", "cuda-")):
            continue
        seen.add(name)
        assert name in known, f"{name} is needed and not in constraints.txt"
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if any(pin.specifier.contains(distribution.version) for pin in known[name]):
            requirements = [Requirement(text) for text in distribution.requires or []]
            waiting += [need.name for need in requirements if applies(need, "{}.{}".format(*sys.version_info))]


def test_package_asks_for_lower_bounds_only():
    for requirement in asked_for():
        assert [specifier.operator for specifier in requirement.specifier] == [">="], requirement


def test_wheel_is_typed_and_complete(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT / "flash_moe", source / "flash_moe", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-c", "import sys, setuptools.build_meta as b; b.build_wheel(sys.argv[1])", str(tmp_path)]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("flash_moe/")}
    expected = {path.relative_to(source).as_posix() for path in (source / "flash_moe").rglob("*.py")}
    expected |= {path.relative_to(source).as_posix() for path in (source / "flash_moe").rglob("*.json")}
    assert inside == expected | {"flash_moe/py.typed"}


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def clean_environment(**changes):
    # Under `make test PYTHON=...` these would hand our own PYTHON down to the make that a test starts.
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "MAKEFLAGS", "MAKELEVEL")}
    return {**inherited, **changes}


def dry_run(directory, *arguments):
    command = ["make", "-n", *arguments]
    return subprocess.run(
        command, cwd=directory, env=clean_environment(), check=True, capture_output=True, text=True
    ).stdout


@needs_make
@pytest.mark.parametrize(
    ("target", "command"), [("demo", "-m flash_moe train"), ("test", "-m pytest -q"), ("quality", "-m mypy")]
)
def test_make_with_python_installs_nothing(target, command):
    printed = dry_run(ROOT, target, "PYTHON=/there/python")
    assert f"/there/python {command}" in printed
    assert "pip" not in printed
    assert "venv" not in printed


@needs_make
@pytest.mark.parametrize(("target", "extra"), [("demo", "train"), ("test", "test"), ("quality", "dev")])
def test_make_installs_once_under_the_constraints(target, extra, tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    first = dry_run(tmp_path, target)
    assert "python3 -m venv .venv" in first
    installs = [line for line in first.splitlines() if "-m pip install" in line]
    assert installs
    assert all("-c constraints.txt" in line for line in installs)
    assert f"'.[{extra}]'" in installs[-1]
    assert f"touch .venv/.installed-{extra}" in first

    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "pip").touch()
    stamp = tmp_path / ".venv" / f".installed-{extra}"
    stamp.touch()
    assert "pip" not in dry_run(tmp_path, target)
    later = stamp.stat().st_mtime + 10
    os.utime(tmp_path / "constraints.txt", (later, later))
    assert "pip install" in dry_run(tmp_path, target)


def readme_commands():
    blocks = re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    return [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]


def ci_steps():
    return re.findall(r"^step (.+)$", (ROOT / ".ci" / "run").read_text(), re.M)


def test_ci_runs_the_quality_checks_then_the_readme_test_command():
    assert "make test" in readme_commands()
    assert ci_steps() == ["make quality", "make test"]


@pytest.mark.parametrize("failing", ["nothing", "quality", "test"])
def test_ci_fails_with_its_steps(failing, tmp_path):
    make = tmp_path / "make"
    make.write_text(f'#!/bin/sh\ntest "$1" != {failing}\n')
    make.chmod(0o755)
    environment = clean_environment(PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    done = subprocess.run(["bash", ROOT / ".ci" / "run"], env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) == (failing == "nothing")
    assert "make quality" in done.stdout
