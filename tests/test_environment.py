"""The environment files agree, the package imports fast, and files name no machine."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PINS = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
LOCK = (ROOT / "requirements.lock").read_text("utf-8")


def canonical(requirement):
    name, _, version = requirement.partition("==")
    return re.sub(r"[-_.]+", "-", name).lower(), version


def test_every_dependency_is_pinned_and_locked():
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in PINS)
    locked = dict(canonical(line) for line in LOCK.splitlines() if not line.startswith("#"))
    assert {canonical(pin) for pin in PINS} <= set(locked.items())


def test_the_lock_is_portable():
    lines = [line for line in LOCK.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.!]+", line) for line in lines), "paths or local builds"
    assert not [line for line in lines if line.startswith(("nvidia", "triton", "labkit"))]


def test_conda_environment_agrees_with_the_project():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
    python, tool, nested = conda["dependencies"]
    assert python.removeprefix("python").strip() == PROJECT["requires-python"] and tool == "pip"
    listed = [line for line in nested["pip"] if not line.startswith("--")]
    assert sorted(listed) == sorted(PINS)
    options = [line for line in nested["pip"] if line.startswith("--")]
    assert options == ["--constraint requirements.lock", "--editable ."]


def test_the_installed_versions_are_the_locked_ones():
    from importlib.metadata import version

    for pin in PINS:
        name, wanted = canonical(pin)
        assert version(name).split("+")[0] == wanted


@pytest.mark.parametrize("module", ["labkit", "labkit.cli"])
def test_import_is_fast(module):
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
        for _ in range(5)
    ]
    assert min(times) < 0.3


@pytest.mark.parametrize("name", ["record", "cli", "plots", "notebooks", "widgets"])
def test_light_modules_load_no_heavy_library(name):
    heavy = {"torch", "transformers", "trl", "peft", "datasets", "wandb", "matplotlib", "papermill"}
    code = f"import labkit.{name}, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert heavy.isdisjoint(done.stdout.split())


# Written in pieces, so that this file does not find itself.
FORBIDDEN = ["/" + "work/", "/" + "root/", "/" + "opt/", "file" + "://", "extra-" + "index-url"]


def test_no_tracked_file_names_a_machine():
    git = ["git", "-C", str(ROOT), "ls-files", "-z"]
    done = subprocess.run(git, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    found = []
    for name in filter(None, done.stdout.split("\0")):
        file = ROOT / name
        if not file.is_file() or file.suffix in {".safetensors", ".png", ".gz"}:
            continue
        text = re.sub(r"[A-Za-z0-9+/=\\n]{200,}", "", file.read_text("utf-8"))  # pictures
        found += [f"{name}: {word}" for word in FORBIDDEN if word in text]
    assert found == []
