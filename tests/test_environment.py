"""The environment files agree, and the package imports fast."""

import json
import re
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from conftest import python

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PINS = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]


def canonical(requirement):
    name, _, version = requirement.partition("==")
    return re.sub(r"[-_.]+", "-", name).lower(), version


def test_every_dependency_is_pinned_locked_and_installed():
    text = (ROOT / "requirements.lock").read_text("utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.!]+", line) for line in lines), "paths or local builds"
    assert not [line for line in lines if line.startswith(("nvidia", "triton", "labkit"))]
    assert {canonical(pin) for pin in PINS} <= set(map(canonical, lines))
    for name, wanted in map(canonical, PINS):
        assert version(name).split("+")[0] == wanted


def test_conda_environment_agrees_with_the_project():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
    python, tool, nested = conda["dependencies"]
    assert python.removeprefix("python").strip() == PROJECT["requires-python"] and tool == "pip"
    options = ["--constraint requirements.lock", "--editable ."]
    assert sorted(nested["pip"]) == sorted(PINS + options)


def test_the_dev_container_has_a_supported_python_and_sets_up_by_make():
    found = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text("utf-8"))
    version = re.fullmatch(r"python:3\.(\d+)-\w+", found["image"])[1]
    low, high = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups()
    assert int(low) <= int(version) < int(high) and found["postCreateCommand"] == "make setup"


HEAVY = set("torch transformers trl peft datasets wandb matplotlib papermill".split())


@pytest.mark.parametrize("name", ["record", "cli", "plots", "notebooks", "widgets"])
def test_import_is_fast_and_loads_no_heavy_library(name):
    code = f"import sys, time; t = time.process_time(); import labkit.{name}; "
    code += "print(time.process_time() - t, *sys.modules)"
    lines = [python(code).stdout.split() for _ in range(3)]
    assert f"labkit.{name}" in lines[0] and HEAVY.isdisjoint(lines[0])
    assert name == "widgets" or min(float(seconds) for seconds, *_ in lines) < 0.3


def test_no_tracked_file_names_a_machine():
    # In brackets, so that this line does not find itself.
    words = "/(wor[k]|roo[t]|op[t])/|file:[/]/|extra-index-[u]rl"
    done = subprocess.run(["git", "-C", str(ROOT), "grep", "-IlE", words], capture_output=True)
    assert done.returncode in (1, 128), done.stdout  # nothing was found, or no checkout
