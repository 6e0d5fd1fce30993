"""The command line: list, show, run, report, doctor, sync, dashboard; refresh for writers.

What can be refused is refused before a kernel starts, in one line, with exit status 2; a
notebook that fails gives its own error and status 1, one that is interrupted status 130.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import webbrowser
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from labkit import notebooks, record, wandb_log
from labkit import report as page
from labkit.files import write_text

_STOPPING = [kind for kind in signal.Signals if kind.name in ("SIGINT", "SIGTERM", "SIGHUP")]
TICK = 60.0  # seconds between lines of a cell that works long, in a log file
_PATH = click.Path(path_type=Path)
_names = click.argument("names", nargs=-1, metavar="NAME...")
_all = click.option("--all", "all_", is_flag=True, help="All notebooks.")
_root = click.argument("root", type=_PATH, required=False)


class _Run(click.Command):
    """`-p key=value` is `-p key value`, as in other tools."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        spread: list[str] = []
        for arg in args:
            given = spread[-1:] in (["-p"], ["--parameter"]) and re.match(r"\w+=", arg)
            spread += arg.split("=", 1) if given else [arg]
        return super().parse_args(ctx, spread)


@click.group()
@click.version_option(package_name="labkit")
def app() -> None:
    """Run the laboratory notebooks and look at what they recorded.

    A NAME is a notebook's full name, or a part of it: 02_lora, lora or 02.
    """
    # A scheduler, or a closed terminal, ends a run as Ctrl-C does; nohup's choice stays.
    for kind in _STOPPING:
        if signal.getsignal(kind) == signal.SIG_DFL:
            signal.signal(kind, _stop)


def _stop(number: int, _: Any) -> None:
    logging.disable()  # else nbclient and asyncio tell at length of a kernel that was stopped too
    raise KeyboardInterrupt(signal.Signals(number).name)


def main() -> None:
    """Entry point: expected errors become one line on stderr and exit status 2."""
    try:
        app()
    except (ValueError, OSError) as error:
        click.echo(f"labkit: {error}", err=True)
        raise SystemExit(2) from None


@app.command("list")
def list_notebooks() -> None:
    """All notebooks: time and memory on two CPU cores, question."""
    found = notebooks.available()
    width = max((len(n.name) for n in found), default=0)
    for n in found:
        cost = f"{n.seconds_cpu or '–':>4} s {n.memory_mb or '–':>5} MB"
        click.echo(f"{n.name:<{width}}  {cost}  {n.question or n.title}")


@app.command()
@click.argument("name")
def show(name: str) -> None:
    """What a notebook asks and costs, and its parameters."""
    path = notebooks.find(name)
    for n in notebooks.available():
        if n.path == path:
            cost = f"{n.seconds_cpu} s, {n.memory_mb} MB on two CPU cores"
            click.echo(f"{n.name}: {n.question}\n{cost}\n")
    click.echo(notebooks.parameters_cell(path))
    click.echo(f"\nlimits: {notebooks.limits(path)}\nlabkit run {path.stem} -p KEY=VALUE")


@app.command(cls=_Run)
@_names
@click.option("-p", "--parameter", type=(str, str), multiple=True, metavar="KEY=VALUE")
@click.option("-f", "--file", type=_PATH, help="YAML file of parameters.")
@click.option("--profile", metavar="NAME", help="notebooks/params/NAME.yaml, such as cpu or gpu.")
@click.option("--output", type=_PATH, help="Put runs/ into this folder, not into the project's.")
@_all
@click.option("--keep-going", is_flag=True, help="After a failure, run the others too.")
@click.option("--force", is_flag=True, help="Run even what does not fit into memory as planned.")
def run(names, parameter, file, profile, output, all_, keep_going, force):  # type: ignore
    """Run notebooks headless.

    Of parameters in the profile, the file and -p (KEY=VALUE or KEY VALUE), the last wins.
    """
    plans = []
    for path in _chosen(names, all_):
        from_profile = _profile(profile, path) if profile else {}
        from_file = _yaml(file) if file else {}
        values = notebooks.validate(from_profile, path, from_file, dict(parameter))
        _check(path.stem, notebooks.parameters(path) | values, force)
        plans.append((path, values))
    failed: list[str] = []
    for path, values in plans:
        if (keep_going or not failed) and not _run_one(path, values, output):
            failed.append(path.stem)
    if failed:
        click.echo(f"labkit: failed: {', '.join(failed)}", err=True)
        raise SystemExit(1)


@app.command()
@_root
@click.option("--out", type=_PATH, help="The page, by default runs/report.html.")
@click.option("--open", "show", is_flag=True, help="Open it in the browser.")
def report(root: Path | None, out: Path | None, show: bool) -> None:
    """Make one HTML page of all runs below ROOT/runs, to sort and compare them."""
    address = page.write(root, out).as_uri()
    click.echo(address)
    if show and not webbrowser.open(address):
        raise ValueError("no browser was found; open the address above in one")


@app.command()
@_root
def sync(root: Path | None) -> None:
    """Send to W&B the runs below ROOT/runs that were made offline."""
    sent = wandb_log.sync(Path(root or record.project_root()))
    click.echo(f"{sent} sent" if sent else "W&B has all runs")


@app.command()
@_root
@click.option("--project", default="labkit", help="Of W&B, as in the parameter wandb_project.")
@click.option("--entity", default="", help="User or team, by default the one logged in.")
def dashboard(root: Path | None, project: str, entity: str) -> None:
    """Make or update the shared workspace and the report of claims on W&B."""
    from labkit import dashboard as shared

    try:
        addresses = shared.update(project, entity, root)
    except Exception as error:  # W&B's have no class in common
        raise ValueError(f"the dashboard was not written: {error}") from error
    click.echo("\n".join(addresses))


@app.command()
def doctor() -> None:
    """What this machine lacks, each with a remedy.

    Exit status 1 if something keeps a notebook from running.
    """
    from labkit.doctor import PROBLEM, examine

    found = [*examine()]
    for sign, text, remedy in found:
        click.echo(f"{sign} {text}" + (f"\n    → {remedy}" if remedy else ""))
    raise SystemExit(int(any(sign == PROBLEM for sign, *_ in found)))


@app.command()
@_names
@_all
def refresh(names: tuple[str, ...], all_: bool) -> None:
    """Execute committed notebooks in place, cleaned.

    One that fails stays as it was.
    """
    for path in _chosen(names, all_):
        began = time.perf_counter()
        folder, found = _recorded(path, {}, None, path.resolve().parent)
        if found["error"]:
            click.echo(f"labkit: {found['error']}", err=True)
            raise SystemExit(1)
        notebooks.keep_verdicts(folder / "notebook.ipynb", found["claims"])
        write_text(path, (folder / "notebook.ipynb").read_text("utf-8"))
        click.echo(f"{path.stem}: {time.perf_counter() - began:.0f} s")


def _check(notebook: str, given: dict[str, Any], force: bool) -> None:
    """Refuses a resumed run, data or a model that will not do. Tinytown always does."""
    record.check_resume(notebook, given)
    for name in ("data", "pretraining_texts", "preferences"):
        if given.get(name, "tinytown") != "tinytown":
            from labkit import data, pairs, templates

            row = data.load(given[name], limit=1)[0]  # all are read
            if name == "data":
                (learns,) = (n.learns for n in notebooks.available() if n.name == notebook)
                needs = {"preferences": pairs.best_first, "prompts": templates.prompt_text}
                needs.get(learns, templates.response)(row)
    if not force and given.get("model", "tinytown") != "tinytown":
        from labkit import memory

        memory.check_fits(notebook, given)


def _execute(path: Path, out: Path, values: dict[str, Any], cwd: Path) -> None:
    """Runs a notebook, with a line that ticks on a terminal; elsewhere, one for each section and,
    while a cell works long, each minute. It has the line of the training that runs.
    """
    began, on_terminal, over = time.perf_counter(), sys.stderr.isatty(), threading.Event()
    section, shown, number, folder = "", "", 0, tempfile.TemporaryDirectory()
    file = Path(folder.name, "progress")
    os.environ["LABKIT_PROGRESS"] = str(file)  # `progress.Live` writes it

    def say() -> None:
        training = file.read_text("utf-8") if file.exists() else ""
        seconds = f"{time.perf_counter() - began:.0f} s"
        parts = (f"{path.stem}: cell {number}", seconds, section, training)
        text = " · ".join(filter(None, parts))
        if on_terminal:
            text = f"\r\x1b[K{text[: shutil.get_terminal_size().columns - 1]}"
        with suppress(OSError):  # the terminal is closed
            click.echo(text, nl=not on_terminal, err=True)

    def tick() -> None:
        while not over.wait(1 if on_terminal else TICK):
            say()

    def on_cell(cell: Any, cell_index: int) -> None:
        nonlocal section, shown, number
        file.unlink(missing_ok=True)
        if cell.cell_type == "markdown":
            section = [section, *re.findall(r"(?m)^##? (.+)", cell.source)][-1]
        else:
            number = cell_index + 1
            if on_terminal or section != shown:
                shown = section
                say()

    ticker = threading.Thread(target=tick, daemon=True)
    ticker.start()
    try:
        notebooks.execute(path, out, values, cwd, on_cell)
    finally:
        over.set()
        ticker.join()
        folder.cleanup()
        del os.environ["LABKIT_PROGRESS"]
        with suppress(OSError):
            click.echo("\r\x1b[K" * on_terminal, nl=False, err=True)


def _recorded(
    path: Path, values: dict[str, Any], output: Path | None, cwd: Path
) -> tuple[Path, dict[str, Any]]:
    """Runs a notebook into a folder of its own and closes its record; returns both."""
    folder = record.new_folder(path.stem, output).resolve()
    os.environ["LABKIT_RUN_DIR"] = str(folder)
    status, error = "finished", ""
    try:
        _execute(path, folder / "notebook.ipynb", values, cwd)
    except KeyboardInterrupt as stop:
        for each in _STOPPING:  # the record is to be closed, whatever else comes
            signal.signal(each, signal.SIG_IGN)
        status, error = "interrupted", f"{path.stem}: interrupted by {str(stop) or 'Ctrl-C'}"
    except Exception as failure:
        status, error = "failed", f"{path.stem}{_failure(failure)}"
    finally:
        del os.environ["LABKIT_RUN_DIR"]
    return folder, record.close(folder, path.stem, values, status, error)


def _run_one(path: Path, values: dict[str, Any], output: Path | None) -> bool:
    began = time.perf_counter()
    folder, found = _recorded(path, values, output, Path.cwd())
    status, error = found["status"], found["error"]
    took, given = f"{time.perf_counter() - began:.0f} s", values | {"resume": folder}
    again = " ".join(f"-p {shlex.quote(f'{name}={value}')}" for name, value in given.items())
    again = f"labkit run {path.stem} {again}" if record.can_resume(folder) else f"see {folder}"
    try:
        address = page.write(output).as_uri()
    except Exception as failure:  # no page is no reason to call the run failed
        address = f"not written: {failure}"
    if status == "interrupted":
        click.echo(f"labkit: {error} after {took}; to go on: {again}", err=True)
        raise SystemExit(130)
    if error:
        click.echo(f"labkit: {error}; to go on: {again}", err=True)
    counts = Counter(claim["verdict"] for claim in found["claims"])
    verdicts = [f"{n} {verdict}" for verdict, n in counts.items()]
    click.echo(" · ".join([f"{path.stem}: {status}", took, *verdicts, str(folder)]))
    click.echo(f"All runs: {address}")
    return status == "finished"


def _failure(error: Any) -> str:
    if hasattr(error, "ename"):  # papermill's, of a cell
        return f", cell [{error.exec_count}]: {error.ename}: {error.evalue}"
    return f": {type(error).__name__}: {str(error).strip() or 'the kernel stopped'}"


def _chosen(names: tuple[str, ...], all_: bool) -> list[Path]:
    if not (names or all_):
        raise ValueError("which notebook? Give names (see `labkit list`) or --all")
    return [n.path for n in notebooks.available()] if all_ else [*map(notebooks.find, names)]


def _profile(profile: str, path: Path) -> dict[str, Any]:
    """Of a profile, the parameters that the notebook has, and those of NAME/<notebook>.yaml."""
    folder = notebooks.folder() / "params"
    own, known = folder / profile / f"{path.stem}.yaml", {f.stem: f for f in folder.glob("*.yaml")}
    if profile not in known:
        raise ValueError(f"no --profile {profile!r}; there are: {', '.join(sorted(known))}")
    mine = notebooks.parameters(path).keys() | notebooks.renamed(path).keys()
    values = {name: value for name, value in _yaml(known[profile]).items() if name in mine}
    return values | (_yaml(own) if own.is_file() else {})


def _yaml(file: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(file.read_text("utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected `name: value` lines, got {values!r:.80}")
    return values


if __name__ == "__main__":
    main()
