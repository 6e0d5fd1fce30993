"""The command line: list, run, report; refresh and check for those who write notebooks.

Everything that can be refused is refused before a kernel starts, in one line, with exit
status 2; a notebook that fails while running gives its own error and status 1.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import click

from labkit import notebooks, tracking

_PATH = click.Path(path_type=Path)
_names = click.argument("names", nargs=-1, metavar="NAME...")
_all = click.option("--all", "all_", is_flag=True, help="All notebooks.")


@click.group()
def app() -> None:
    """Run the laboratory notebooks and look at what they recorded.

    A NAME is a notebook's full name, or a part of it: 02_lora, lora or 02.
    """


def main() -> None:
    """Entry point: expected errors become one line on stderr and exit status 2."""
    try:
        app()
    except (ValueError, OSError) as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if isinstance(error, OSError) and error.filename:
            text = f"{error.filename}: {text}"
        click.echo(f"labkit: {text}", err=True)
        raise SystemExit(2) from None


@app.command("list")
def list_notebooks() -> None:
    """Name, time and memory on two CPU cores, and question of every notebook."""
    found = notebooks.available()
    width = max((len(n.name) for n in found), default=0)
    for n in found:
        cost = f"{_or_dash(n.seconds_cpu):>4} s {_or_dash(n.memory_mb):>5} MB"
        click.echo(f"{n.name:<{width}}  {cost}  {n.question or n.title}")


@app.command()
@_names
@click.option(
    "-p",
    "--parameter",
    type=(str, str),
    multiple=True,
    metavar="KEY VALUE",
    help="Set a parameter; may be repeated.",
)
@click.option("-f", "--file", type=_PATH, help="YAML file of parameters.")
@click.option("--profile", metavar="NAME", help="notebooks/params/NAME.yaml, such as cpu or gpu.")
@click.option("--output", type=_PATH, help="Put runs/ into this folder, not into the project's.")
@_all
@click.option("--keep-going", is_flag=True, help="After a failure, run the others too.")
@click.option("--force", is_flag=True, help="Run even what the planner says cannot fit.")
def run(
    names: tuple[str, ...],
    parameter: tuple[tuple[str, str], ...],
    file: Path | None,
    profile: str | None,
    output: Path | None,
    all_: bool,
    keep_going: bool,
    force: bool,
) -> None:
    """Run notebooks headless.

    Parameters come from the profile, then from the file, then from -p; the last wins.
    """
    plans = []
    for path in _chosen(names, all_):
        values = _profile(profile, path) if profile else {}
        values |= _yaml(file, "-f") if file else {}
        values |= dict(parameter)
        plans.append((path, notebooks.validate(values, path)))
        if not force:
            _refuse_what_cannot_fit(*plans[-1])
    failed = []
    for path, values in plans:
        if not _run_one(path, values, output):
            failed.append(path.stem)
            if not keep_going:
                break
    if failed:
        click.echo(f"labkit: failed: {', '.join(failed)}", err=True)
        raise SystemExit(1)


@app.command()
@click.argument("root", type=_PATH, required=False)
@click.option("--out", type=_PATH, help="The page, by default runs/report.html.")
def report(root: Path | None, out: Path | None) -> None:
    """Make one HTML page of all runs below ROOT/runs: a table, the curves, the claims."""
    click.echo(_short(tracking.report(root, out)))


@app.command()
@_names
@_all
def refresh(names: tuple[str, ...], all_: bool) -> None:
    """Execute committed notebooks in place and clean them of what a run leaves behind."""
    for path in _chosen(names, all_):
        began = time.perf_counter()
        try:
            notebooks.execute(path, path, cwd=path.resolve().parent, progress=_Line(path.stem))
        except Exception as error:
            click.echo(f"labkit: {_failure(path.stem, error)}", err=True)
            raise SystemExit(1) from error
        click.echo(f"{path.stem}: {time.perf_counter() - began:.0f} s")


@app.command()
@_names
def check(names: tuple[str, ...]) -> None:
    """Check committed notebooks (all, without a name) against the notebook contract."""
    paths = _chosen(names, all_=not names)
    problems = [f"{path.stem}: {problem}" for path in paths for problem in notebooks.check(path)]
    for problem in problems:
        click.echo(problem)
    if problems:
        raise SystemExit(1)
    click.echo(f"{len(paths)} notebooks keep the contract")


class _Line:
    """One updating line on a terminal; elsewhere one line for each section."""

    def __init__(self, name: str) -> None:
        self._name, self._began, self._last = name, time.perf_counter(), ""

    def __call__(self, done: int, total: int, heading: str) -> None:
        seconds = time.perf_counter() - self._began
        text = f"{self._name}: cell {done + 1}/{total} · {seconds:.0f} s · {heading}"
        if sys.stderr.isatty():
            end = "\r" if done + 1 < total else "\n"
            click.echo(f"\r\x1b[K{text[:100]}{end}", nl=False, err=True)
        elif heading != self._last:
            click.echo(text, err=True)
        self._last = heading


def _run_one(path: Path, values: dict[str, Any], output: Path | None) -> bool:
    folder = tracking.new_folder(path.stem, output).resolve()
    before = os.environ.get("LABKIT_RUN_DIR")
    os.environ["LABKIT_RUN_DIR"] = str(folder)
    began, error = time.perf_counter(), ""
    try:
        notebooks.execute(path, folder / "notebook.ipynb", values, progress=_Line(path.stem))
    except OSError:
        raise
    except Exception as failure:  # of the notebook or its kernel: told, recorded, status 1
        error = _failure(path.stem, failure)
    finally:
        os.environ.pop("LABKIT_RUN_DIR")
        if before is not None:
            os.environ["LABKIT_RUN_DIR"] = before
    tracking.close(folder, path.stem, values, "failed" if error else "finished", error)
    if error:
        click.echo(f"labkit: {error}", err=True)
    state = "failed" if error else "finished"
    click.echo(f"{path.stem}: {state} · {time.perf_counter() - began:.0f} s · {_short(folder)}")
    return not error


def _failure(name: str, error: Exception) -> str:
    from papermill.exceptions import PapermillExecutionError

    if isinstance(error, PapermillExecutionError):
        full = "No space left" in error.evalue and "free some" not in error.evalue
        hint = "; free some space, or choose another folder by --output" if full else ""
        return f"{name}, cell [{error.exec_count}]: {error.ename}: {error.evalue}{hint}"
    return f"{name}: {type(error).__name__}: {str(error).strip() or 'the kernel stopped'}"


def _chosen(names: tuple[str, ...], all_: bool) -> list[Path]:
    if all_:
        paths = [n.path for n in notebooks.available()]
        if not paths:
            raise FileNotFoundError(f"there is no notebook in {notebooks.folder()}")
        return paths
    if not names:
        raise ValueError("which notebook? Give names (see `labkit list`) or --all")
    return [notebooks.find(name) for name in names]


def _refuse_what_cannot_fit(path: Path, values: dict[str, Any]) -> None:
    """Asks the planner about models that are not the embedded one, which fits wherever it runs."""
    defaults = {name: p.default for name, p in notebooks.parameters(path).items()}
    if (defaults | values).get("model", "tinytown") != "tinytown":
        from labkit import memory

        memory.refuse(path.stem, defaults | values)


def _profile(profile: str, path: Path) -> dict[str, Any]:
    """A profile serves all notebooks, so each takes from it only the parameters that it has.

    What one notebook alone wants, such as its learning rate, is in NAME/<notebook>.yaml.
    """
    folder = notebooks.folder() / "params"
    file = folder / f"{profile}.yaml"
    known = sorted(f.stem for f in folder.glob("*.yaml"))
    if not file.is_file():
        near = notebooks.nearest(profile, known)
        raise ValueError(f"no --profile {profile!r}{near}; there are: {', '.join(known) or 'none'}")
    mine = notebooks.parameters(path)
    values = {name: value for name, value in _yaml(file, "--profile").items() if name in mine}
    own = folder / profile / f"{path.stem}.yaml"
    return values | (_yaml(own, "--profile") if own.is_file() else {})


def _yaml(file: Path, option: str) -> dict[str, Any]:
    import yaml

    if not file.is_file():
        raise FileNotFoundError(f"{option}: there is no file {file}")
    try:
        values = yaml.safe_load(file.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{option} {file}: not a YAML file: {reason}") from error
    values = {} if values is None else values
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{option} {file}: expected `name: value` lines, got {values!r:.80}")
    return values


def _short(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _or_dash(value: int | None) -> str:
    return "–" if value is None else str(value)


if __name__ == "__main__":
    main()
