"""The command line: list, run, report, sync, dashboard; refresh for those who write notebooks.

What can be refused is refused before a kernel starts, in one line, with exit status 2; a
notebook that fails or is interrupted gives its own error and status 1.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
import webbrowser
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from labkit import notebooks, record, wandb_log
from labkit import report as page

_STOPPING = [kind for kind in signal.Signals if kind.name in ("SIGINT", "SIGTERM", "SIGHUP")]
_PATH = click.Path(path_type=Path)
_names = click.argument("names", nargs=-1, metavar="NAME...")
_all = click.option("--all", "all_", is_flag=True, help="All notebooks.")


@click.group()
def app() -> None:
    """Run the laboratory notebooks and look at what they recorded.

    A NAME is a notebook's full name, or a part of it: 02_lora, lora or 02.
    """
    # A scheduler, or a closed terminal, ends a run as Ctrl-C does; nohup's choice stays.
    for kind in _STOPPING:
        if signal.getsignal(kind) == signal.SIG_DFL:
            signal.signal(kind, _stop)


def _stop(number: int, _: Any) -> None:
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
    """Name, time and memory on two CPU cores, and question of every notebook."""
    found = notebooks.available()
    width = max((len(n.name) for n in found), default=0)
    for n in found:
        cost = f"{n.seconds_cpu or '–':>4} s {n.memory_mb or '–':>5} MB"
        click.echo(f"{n.name:<{width}}  {cost}  {n.question or n.title}")


@app.command()
@_names
@click.option("-p", "--parameter", type=(str, str), multiple=True, metavar="KEY VALUE")
@click.option("-f", "--file", type=_PATH, help="YAML file of parameters.")
@click.option("--profile", metavar="NAME", help="notebooks/params/NAME.yaml, such as cpu or gpu.")
@click.option("--output", type=_PATH, help="Put runs/ into this folder, not into the project's.")
@_all
@click.option("--keep-going", is_flag=True, help="After a failure, run the others too.")
@click.option("--force", is_flag=True, help="Run even what does not fit into memory as planned.")
def run(names, parameter, file, profile, output, all_, keep_going, force):  # type: ignore
    """Run notebooks headless; of parameters in the profile, the file and -p, the last wins."""
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
@click.argument("root", type=_PATH, required=False)
@click.option("--out", type=_PATH, help="The page, by default runs/report.html.")
@click.option("--open", "show", is_flag=True, help="Open it in the browser.")
def report(root: Path | None, out: Path | None, show: bool) -> None:
    """Make one HTML page of all runs below ROOT/runs, to sort and compare them."""
    address = page.write(root, out).as_uri()
    click.echo(address)
    if show and not webbrowser.open(address):
        raise ValueError("no browser was found; open the address above in one")


@app.command()
@click.argument("root", type=_PATH, required=False)
def sync(root: Path | None) -> None:
    """Send to W&B the runs below ROOT/runs that were made offline."""
    sent = wandb_log.sync(Path(root or record.project_root()))
    click.echo(f"{sent} sent" if sent else "W&B has all runs")


@app.command()
@click.argument("root", type=_PATH, required=False)
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
@_names
@_all
def refresh(names: tuple[str, ...], all_: bool) -> None:
    """Execute committed notebooks in place, cleaned; one that fails stays as it was."""
    for path in _chosen(names, all_):
        began = time.perf_counter()
        new = path.with_name(f".{path.stem}.{os.getpid()}.ipynb")
        try:
            _execute(path, new, {}, path.resolve().parent)
            os.replace(new, path)
        except (Exception, KeyboardInterrupt) as error:
            click.echo(f"labkit: {_failure(path.stem, error)}", err=True)
            raise SystemExit(1) from None
        finally:
            new.unlink(missing_ok=True)
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
                (pairs.best_first if learns == "preferences" else templates.response)(row)
    if not force and given.get("model", "tinytown") != "tinytown":
        from labkit import memory

        memory.check_fits(notebook, given)


def _execute(path: Path, out: Path, values: dict[str, Any], cwd: Path) -> None:
    """Runs a notebook, with a line of progress on a terminal; elsewhere, one for each section."""
    began, on_terminal, section, shown = time.perf_counter(), sys.stderr.isatty(), "", ""

    def say(text: str) -> None:
        with suppress(OSError):  # the terminal is closed
            click.echo(text, nl=False, err=True)

    def on_cell(cell: Any, cell_index: int) -> None:
        nonlocal section, shown
        if cell.cell_type == "markdown":
            section = [section, *re.findall(r"(?m)^##? (.+)", cell.source)][-1]
        elif on_terminal or section != shown:
            shown, seconds = section, time.perf_counter() - began
            text = f"{path.stem}: cell {cell_index + 1} · {seconds:.0f} s · {section}"
            say(f"\r\x1b[K{text[:100]}" if on_terminal else f"{text}\n")

    try:
        notebooks.execute(path, out, values, cwd, on_cell)
    finally:
        say("\r\x1b[K" if on_terminal else "")


def _run_one(path: Path, values: dict[str, Any], output: Path | None) -> bool:
    folder = record.new_folder(path.stem, output).resolve()
    os.environ["LABKIT_RUN_DIR"] = str(folder)
    began, status, error = time.perf_counter(), "finished", ""
    try:
        _execute(path, folder / "notebook.ipynb", values, Path.cwd())
    except (Exception, KeyboardInterrupt) as failure:  # of the notebook, or from outside
        status = "interrupted" if isinstance(failure, KeyboardInterrupt) else "failed"
        error = _failure(path.stem, failure)
    if status == "interrupted":
        for kind in _STOPPING:  # the record is to be closed, whatever else comes
            signal.signal(kind, signal.SIG_IGN)
    record.close(folder, path.stem, values, status, error)
    if error:
        click.echo(f"labkit: {error}", err=True)
    click.echo(f"{path.stem}: {status} · {time.perf_counter() - began:.0f} s · {folder}")
    if status != "finished" and record.can_resume(folder):
        click.echo(f"To go on from its last checkpoint, add: -p resume {folder}")
    try:
        click.echo(f"All runs: {page.write(output).as_uri()}")
    except Exception as failure:  # no page is no reason to call the run failed
        click.echo(f"labkit: the report was not written: {failure}", err=True)
    if status == "interrupted":
        raise SystemExit(1)
    return status == "finished"


def _failure(name: str, error: Any) -> str:
    if isinstance(error, KeyboardInterrupt):
        return f"{name}: interrupted by {error or 'Ctrl-C'}"
    if hasattr(error, "ename"):  # papermill's, of a cell
        return f"{name}, cell [{error.exec_count}]: {error.ename}: {error.evalue}"
    return f"{name}: {type(error).__name__}: {str(error).strip() or 'the kernel stopped'}"


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
