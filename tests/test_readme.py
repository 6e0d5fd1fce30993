"""The README promises nothing that is not there: its commands parse, its paths exist."""

import re
import shlex
from pathlib import Path

import click
import pytest

from labkit import cli

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, re.DOTALL)
SHELL = [line for language, block in BLOCKS if language == "sh" for line in block.splitlines()]
PROSE = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
INLINE = re.findall(r"`([^`\n]+)`", PROSE)
COMMANDS = sorted({c for c in SHELL + INLINE if c.startswith("labkit ")})
TOPS = {p.name for p in ROOT.iterdir()}


def tree():
    """The paths of the tree under "Where things are": two blanks a level."""
    (block,) = [b for language, b in BLOCKS if not language]
    parents, found = {}, []
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        parents[depth] = line.split()[0]
        found.append("".join(parents[level] for level in range(depth + 1)))
    return found


def mentioned():
    """Files and folders named in the prose or linked; not those with a blank or <name> in them."""
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    files = [x for x in INLINE if re.fullmatch(r"[\w./-]+", x) and x.split("/")[0] in TOPS]
    return sorted({*links, *files})


@pytest.mark.parametrize("line", COMMANDS)
def test_labkit_commands_parse(line):
    command, *arguments = shlex.split(line, comments=True)[1:]
    assert command in cli.app.commands, f"labkit has no command {command!r}"
    cli.app.commands[command].make_context(command, arguments)


def test_a_command_that_does_not_parse_would_be_found():
    with pytest.raises(click.UsageError):
        cli.app.commands["run"].make_context("run", ["lora", "--no-such-option"])


def test_there_are_commands_and_paths_to_check():
    assert len(COMMANDS) >= 5 and len(tree()) > 30 and len(mentioned()) > 8


@pytest.mark.parametrize("path", tree())
def test_the_tree_is_the_real_one(path):
    assert (ROOT / path).exists()
    assert (ROOT / path).is_dir() == path.endswith("/")


@pytest.mark.parametrize("path", mentioned())
def test_paths_exist(path):
    if path.startswith("runs/"):
        pytest.skip("made by running the notebooks")
    assert (ROOT / path).exists()


def test_every_module_is_in_the_tree():
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "labkit").rglob("*.py")}
    assert {m for m in modules if not m.endswith("__init__.py")} <= set(tree())


def test_the_table_has_every_notebook_and_no_other():
    section = TEXT.split("## The notebooks")[1].split("\n## ")[0]
    rows = re.findall(r"^\| \[(\w+)\]\(notebooks/(\w+)\.ipynb\)", section, re.MULTILINE)
    assert all(name == target for name, target in rows)
    there = {p.stem for p in (ROOT / "notebooks").glob("[0-9]*.ipynb")}
    assert {name for name, _ in rows} == there and len(rows) == len(there)


@pytest.mark.parametrize("target", sorted({c for c in SHELL if c.startswith("make ")}))
def test_make_targets_exist(target):
    name = target.split()[1]
    assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)


def test_pictures_are_small():
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", TEXT)
    assert pictures
    for picture in pictures:
        assert (ROOT / picture).stat().st_size < 100_000
