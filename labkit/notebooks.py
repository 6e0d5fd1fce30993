"""Find, parameterize, execute and clean the notebooks.

papermill executes them, and checks no values: that is done here, before a kernel starts.
"""

from __future__ import annotations

import ast
import difflib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal


@dataclass
class NotebookInfo:
    """What `labkit list` shows; all but name, path and title come from the metadata `labkit`."""

    name: str
    path: Path
    title: str
    question: str = ""
    seconds_cpu: int | None = None
    memory_mb: int | None = None
    claims: list[int] = field(default_factory=list)


def folder() -> Path:
    """The notebooks' folder: `$LABKIT_NOTEBOOKS`, or `notebooks/` of the project."""
    place = Path(os.environ.get("LABKIT_NOTEBOOKS") or Path(__file__).parents[1] / "notebooks")
    if not place.is_dir():
        raise FileNotFoundError(f"no notebooks in {place}: work in a clone or set LABKIT_NOTEBOOKS")
    return place


def available() -> list[NotebookInfo]:
    """All notebooks of the folder, in the order of their names."""
    found = []
    for path in sorted(folder().glob("[0-9]*.ipynb")):
        cells, about = _read(path)
        title = re.search(r"^# (.+)$", cells[0]["source"] if cells else "", re.MULTILINE)
        known = {k: about[k] for k in about.keys() & NotebookInfo.__dataclass_fields__.keys()}
        found.append(NotebookInfo(path.stem, path, title[1] if title else path.stem, **known))
    return found


def find(name: str) -> Path:
    """The notebook called `name`: `02_lora`, `lora`, `02`, or a path to an .ipynb file."""
    if name.endswith(".ipynb") and Path(name).is_file():
        return Path(name)
    paths = sorted(folder().glob("[0-9]*.ipynb"))
    known = {n.lower(): p for p in paths for n in (*p.stem.split("_", 1), p.stem)}
    wanted = Path(name).stem.lower().replace("-", "_")
    if wanted not in known:
        raise ValueError(f"no notebook is called {name!r}{nearest(wanted, known)}; see labkit list")
    return known[wanted]


def nearest(name: str, known: Iterable[str]) -> str:
    """', did you mean …?' with the known name most like `name`, or nothing."""
    match = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f", did you mean {match[0]!r}?" if match else ""


def parameters(path: Path) -> dict[str, Any]:
    """The names and defaults of a notebook's parameters, from the cell tagged `parameters`.

    The cell is parsed: papermill's `inspect_notebook` skips lines with a second `=`, in a
    comment for instance. Raises `ValueError` for a line that is not `name = literal`.
    """
    tagged = [c["source"] for c in _read(path)[0] if "parameters" in c["metadata"].get("tags", [])]
    found = {}
    for node in ast.parse("\n".join(tagged)).body:
        try:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target  # type: ignore
            found[target.id] = ast.literal_eval(node.value)  # type: ignore
        except (AttributeError, ValueError):
            raise ValueError(f"{path.name}: not `name = literal`: {ast.unparse(node)}") from None
    return found


def renamed(path: Path) -> dict[str, str]:
    """Former names of parameters, from the metadata `labkit.renamed`: `{old: new}`."""
    return _read(path)[1].get("renamed", {})


def validate(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Check `values` against the notebook's parameters and return them in the right types.

    The type is the default's; limits are in the metadata. A text is converted where the
    parameter is none. Raises `ValueError` naming the parameter, what was expected and what came.
    """
    import yaml
    from pydantic import TypeAdapter, ValidationError

    defaults, limits, former = parameters(path), _read(path)[1].get("limits", {}), renamed(path)
    checked = {}
    for given, value in values.items():
        if (name := former.get(given, given)) != given:
            logging.getLogger("labkit").warning("%s: %r is now %r", path.stem, given, name)
        if name not in defaults:
            near = f"{nearest(name, defaults)}; it has: {', '.join(defaults) or 'none'}"
            raise ValueError(f"{path.stem} has no parameter {name!r}{near}")
        default, text, read = defaults[name], isinstance(value, str), value
        if text and not isinstance(default, (str, int, float)):  # a list, or of any type
            with suppress(yaml.YAMLError):
                read = yaml.safe_load(value)
        kind = TypeAdapter(_type(default, limits.get(name)))
        try:
            checked[name] = kind.validate_python(read, strict=not text)
        except ValidationError as error:
            reason = f"{error.errors()[0]['msg']} (default {default!r}); got {value!r}"
            raise ValueError(f"{path.stem}: parameter {name!r}: {reason}") from None
    return checked


def execute(path: Path, out: Path, values: dict[str, Any], cwd: Path, on_cell: Callable) -> None:
    """Run a notebook in a fresh kernel and leave the cleaned result at `out`, also on failure.

    `cwd` is the kernel's folder; `on_cell(cell=…, cell_index=…)` is called before each cell. A
    failing cell raises papermill's `PapermillExecutionError`.
    """
    import papermill
    from traitlets.config import Config

    # The kernel of this environment is meant, not one of the same name elsewhere.
    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # Other users of the machine must not read what kernel and papermill say.
    private = Config({"KernelManager": {"transport_encryption": "auto"}})
    options = {"kernel_name": "python3", "language": "python", "progress_bar": False}
    options |= {"cwd": cwd, "on_cell_start": on_cell, "config": private}
    try:
        papermill.execute_notebook(path, out, parameters=values, **options)
    finally:
        if out.exists():
            clean(out)


def clean(path: Path) -> None:
    """Drop what a run leaves in the notebook: timings, metadata of papermill, dead widgets."""
    import nbformat

    nb = nbformat.read(path, as_version=4)
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    about = {"kernelspec": kernel, "labkit": nb.metadata.get("labkit", {})}
    nb.metadata = nbformat.from_dict(about | {"language_info": {"name": "python"}})
    nb.cells = [cell for cell in nb.cells if "papermill-error-cell" not in cell.source]
    for cell in nb.cells:
        tags = [tag for tag in cell.metadata.get("tags", []) if not tag.startswith("papermill-")]
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
            if "metadata" in output:
                output.metadata = nbformat.from_dict({})
    path.write_text(nbformat.writes(nb).rstrip("\n") + "\n", encoding="utf-8")


def _read(path: Path) -> tuple[list[Any], dict[str, Any]]:
    """(cells with their source as text, the metadata `labkit`), without the slow nbformat."""
    try:
        nb = json.loads(path.read_text("utf-8"))
        cells = [cell | {"source": "".join(cell["source"])} for cell in nb["cells"]]
        return cells, nb["metadata"].get("labkit", {})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a notebook of nbformat 4: {error!r}") from error


def _type(default: Any, limits: list[Any] | None) -> Any:
    """The default's type, with its limits: [lowest, highest], one may be None, or the choices."""
    from pydantic import Field

    if isinstance(default, (list, tuple)):
        same = len({type(item) for item in default}) == 1
        return list[_type(default[0], limits)] if same else list  # type: ignore[misc]
    if limits and isinstance(limits[0], str):
        return Literal[tuple(limits)]
    if limits:
        return Annotated[type(default), Field(ge=limits[0], le=limits[1])]
    return Any if default is None else type(default)
