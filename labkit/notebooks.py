"""Find, parameterize, execute and clean the notebooks.

papermill does the executing; here is what it leaves out: parameters are checked against the
notebook's own parameters cell before a kernel starts, and the executed file replaces its
target as a whole. The rules for committed notebooks are in `labkit.checker`.
"""

from __future__ import annotations

import ast
import difflib
import io
import os
import re
import tokenize
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

Progress = Callable[[int, int, str], None]
_SCALARS: dict[str, type] = {"int": int, "float": float, "str": str, "bool": bool}


@dataclass(frozen=True)
class NotebookInfo:
    """What `labkit list` shows; question, cost and claims come from the metadata `labkit`."""

    name: str
    path: Path
    title: str
    question: str = ""
    seconds_cpu: int | None = None
    memory_mb: int | None = None
    claims: tuple[int, ...] = ()


@dataclass(frozen=True)
class Parameter:
    """One assignment of the parameters cell; `kind` is its annotation or its default's type."""

    name: str
    kind: str
    default: Any
    help: str = ""
    limits: list[Any] = field(default_factory=list)


def folder() -> Path:
    """The notebooks' folder: `$LABKIT_NOTEBOOKS`, or `notebooks/` of the project."""
    named = os.environ.get("LABKIT_NOTEBOOKS")
    place = Path(named) if named else Path(__file__).resolve().parents[1] / "notebooks"
    if not place.is_dir():
        raise FileNotFoundError(
            f"no notebooks in {place}: work in a clone of the project, or set LABKIT_NOTEBOOKS"
        )
    return place


def available() -> list[NotebookInfo]:
    """All notebooks of the folder, in the order of their names."""
    return [info(path) for path in sorted(folder().glob("[0-9]*.ipynb"))]


def info(path: Path) -> NotebookInfo:
    """Title and metadata of one notebook."""
    nb = read(path)
    first = nb.cells[0].source if nb.cells else ""
    found = re.search(r"^# (.+)$", first, re.MULTILINE)
    meta = nb.metadata.get("labkit", {})
    return NotebookInfo(
        name=path.stem,
        path=path,
        title=found[1].strip() if found else path.stem,
        question=meta.get("question", ""),
        seconds_cpu=meta.get("seconds_cpu"),
        memory_mb=meta.get("memory_mb"),
        claims=tuple(meta.get("claims", ())),
    )


def find(name: str) -> Path:
    """The notebook called `name`: `02_lora`, `lora`, `02`, or a path to an .ipynb file."""
    if name.endswith(".ipynb") and Path(name).is_file():
        return Path(name)
    wanted = Path(name).stem.lower().replace("-", "_")
    by_alias: dict[str, Path] = {}
    for path in sorted(folder().glob("[0-9]*.ipynb")):
        number, _, rest = path.stem.partition("_")
        for alias in (path.stem, rest, number):
            by_alias.setdefault(alias.lower(), path)
    if wanted in by_alias:
        return by_alias[wanted]
    known = sorted({path.stem for path in by_alias.values()})
    raise ValueError(
        f"no notebook is called {name!r}{nearest(wanted, by_alias)}; there are: "
        + (", ".join(known) or "none")
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """', did you mean …?' with the known name most like `name`, or nothing."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean {match[0]!r}?" if match else ""


def read(path: Path) -> Any:
    """A notebook as nbformat's version 4. Raises `ValueError` naming a file that is none."""
    import nbformat

    try:
        return nbformat.read(path, as_version=4)
    except (nbformat.reader.NotJSONError, nbformat.ValidationError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0][:120]
        raise ValueError(f"{path} is not a notebook that can be read: {reason}") from error


def parameters(path: Path) -> dict[str, Parameter]:
    """The parameters of a notebook by name, from the cell tagged `parameters`."""
    nb = read(path)
    tagged = [c for c in nb.cells if "parameters" in c.metadata.get("tags", [])]
    limits = nb.metadata.get("labkit", {}).get("limits", {})
    found: dict[str, Parameter] = {}
    for cell in tagged:
        for parameter in parse_parameters(cell.source):
            bounds = list(limits.get(parameter.name, []))
            found[parameter.name] = Parameter(
                parameter.name, parameter.kind, parameter.default, parameter.help, bounds
            )
    return found


def parse_parameters(source: str) -> list[Parameter]:
    """Read `name = literal` and `name: type = literal` lines; anything else is a ValueError."""
    comments = _comments(source)
    found = []
    for node in ast.parse(source).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        single = not isinstance(node, ast.Assign) or len(node.targets) == 1
        value = getattr(node, "value", None)
        if not (isinstance(target, ast.Name) and single and isinstance(value, ast.expr)):
            line = ast.unparse(node).splitlines()[0]
            raise ValueError(f"line {node.lineno}: expected `name = literal`, got `{line}`")
        try:
            default = ast.literal_eval(value)
        except ValueError:
            raise ValueError(
                f"line {node.lineno}: {target.id} must be a literal, got `{ast.unparse(value)}`"
            ) from None
        kind = ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else _kind(default)
        found.append(Parameter(target.id, kind, default, comments.get(node.end_lineno or 0, "")))
    return found


def validate(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Check `values` against the notebook's parameters and return them in the right types.

    A text is converted where the parameter is a number, a truth value or a list (YAML reads
    `1e-3` as text). Raises `ValueError` naming the parameter, what was expected, what came.
    """
    known = parameters(path)
    for name in values:
        if name not in known:
            raise ValueError(
                f"{path.stem} has no parameter {name!r}{nearest(name, known)}; "
                f"it has: {', '.join(known) or 'none'}"
            )
    return {name: _checked(known[name], value, path.stem) for name, value in values.items()}


def execute(
    path: Path,
    out: Path,
    values: dict[str, Any] | None = None,
    *,
    cwd: Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Run a notebook in a fresh kernel and leave the cleaned result at `out`, also on failure.

    `values` must have passed `validate`. `cwd` is the kernel's folder, by default the current
    one. `progress(done, total, heading)` is called before each code cell. A failing cell
    raises `papermill.PapermillExecutionError`.
    """
    import papermill
    from traitlets.config import Config

    partial = out.with_name(f".{out.stem}.{os.getpid()}.ipynb")
    # The kernel of this environment is meant, not one of the same name elsewhere.
    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    _register_engine()
    try:
        papermill.execute_notebook(
            path,
            partial,
            parameters=values or {},
            engine_name="labkit",
            kernel_name="python3",
            language="python",
            progress_bar=False,
            cwd=cwd or Path.cwd(),
            labkit_progress=progress,
            # Other users of the machine must not read what kernel and papermill say.
            config=Config({"KernelManager": {"transport_encryption": "auto"}}),
        )
    finally:
        if partial.exists():
            nb = read(partial)
            clean(nb)
            write(nb, partial)
            os.replace(partial, out)


def write(nb: Any, path: Path) -> None:
    """Write a notebook with a final newline, as editors and formatters do."""
    import nbformat

    path.write_text(nbformat.writes(nb).rstrip("\n") + "\n", encoding="utf-8")


def clean(nb: Any) -> None:
    """Drop, in place, what a run leaves behind: timings, papermill and widget metadata.

    Widget views are dropped from the outputs too: without their state, which is large, they
    only show an error.
    """
    for name in set(nb.metadata) - {"labkit"}:
        del nb.metadata[name]
    nb.metadata["kernelspec"] = {
        "display_name": "Python 3 (ipykernel)",
        "language": "python",
        "name": "python3",
    }
    nb.metadata["language_info"] = {"name": "python"}
    for cell in nb.cells:
        tags = [t for t in cell.metadata.get("tags", []) if not t.startswith("papermill-")]
        cell.metadata = {"tags": tags} if tags else {}
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
            if "metadata" in output:
                output.metadata = {}
    nb.cells = [c for c in nb.cells if "papermill-error-cell" not in c.get("source", "")]


def check(path: Path) -> list[str]:
    """What breaks the notebook contract, one line each; empty when all is well."""
    from labkit import checker

    return checker.check(path)


@cache
def _register_engine() -> None:
    from papermill.engines import NBClientEngine, papermill_engines

    class LabkitEngine(NBClientEngine):
        """papermill's own engine, telling which cell begins."""

        @classmethod
        def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **options: Any) -> None:
            report: Progress | None = options.pop("labkit_progress", None)
            headings, total, began = _headings(nb_man.nb), len(nb_man.nb.cells), nb_man.cell_start

            def cell_start(cell: Any, cell_index: int | None = None, **rest: Any) -> None:
                if report is not None and cell_index is not None:
                    report(cell_index, total, headings[cell_index])
                began(cell, cell_index, **rest)

            nb_man.cell_start = cell_start
            super().execute_managed_notebook(nb_man, kernel_name, **options)

    papermill_engines.register("labkit", LabkitEngine)


def _headings(nb: Any) -> list[str]:
    current, headings = "", []
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            lines = [x for x in cell.source.splitlines() if re.match(r"#{1,2} ", x)]
            current = lines[-1].lstrip("# ") if lines else current
        headings.append(current)
    return headings


def _kind(default: Any) -> str:
    if default is None:
        return "Any"
    if isinstance(default, (list, tuple)):
        inner = {type(item).__name__ for item in default}
        return f"list[{inner.pop()}]" if len(inner) == 1 else "list"
    return type(default).__name__


def _comments(source: str) -> dict[int, str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}


def _checked(parameter: Parameter, value: Any, notebook: str) -> Any:
    kinds = [kind.strip() for kind in parameter.kind.split("|")]
    for kind in sorted(kinds, key=lambda kind: kind != "None"):
        fits, result = _convert(value, kind)
        if fits:
            break
    else:
        raise ValueError(
            f"parameter {parameter.name!r} of {notebook} must be {parameter.kind} "
            f"(default {parameter.default!r}); got {value!r}"
        )
    limits = parameter.limits
    for item in result if isinstance(result, list) else [result]:
        if limits and item is not None and not _within(item, limits):
            raise ValueError(
                f"parameter {parameter.name!r} of {notebook} must be {_described(limits)}; "
                f"got {item!r}"
            )
    return result


def _convert(value: Any, kind: str) -> tuple[bool, Any]:
    """(does it fit, the value in that type)."""
    import yaml

    if kind == "None":
        return value is None or value in ("null", "None"), None
    if kind == "str":
        return isinstance(value, str), value
    if isinstance(value, str):
        try:
            value = yaml.safe_load(value) if kind != "float" else float(value)
        except (ValueError, yaml.YAMLError):
            return False, value
    if kind == "Any":
        return True, value
    if kind in _SCALARS:
        if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        return type(value) is _SCALARS[kind], value
    return _convert_container(value, kind)


def _convert_container(value: Any, kind: str) -> tuple[bool, Any]:
    outer, _, inner = kind.partition("[")
    if outer in ("list", "tuple"):
        if not isinstance(value, (list, tuple)):
            return False, value
        if not inner:
            return True, list(value)
        pairs = [_convert(item, inner.rstrip("]").split(",")[0].strip()) for item in value]
        return all(fits for fits, _ in pairs), [item for _, item in pairs]
    return (isinstance(value, dict) if outer == "dict" else True), value


def _is_range(limits: list[Any]) -> bool:
    return len(limits) == 2 and not any(isinstance(v, (str, bool)) for v in limits)


def _within(value: Any, limits: list[Any]) -> bool:
    if not _is_range(limits):
        return value in limits
    low, high = limits
    return value == value and (low is None or value >= low) and (high is None or value <= high)


def _described(limits: list[Any]) -> str:
    if not _is_range(limits):
        return "one of " + ", ".join(map(str, limits))
    low, high = limits
    if low is not None and high is not None:
        return f"between {low} and {high}"
    return f"at least {low}" if high is None else f"at most {high}"
