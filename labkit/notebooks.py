"""Find, parameterize, execute and clean the notebooks.

papermill executes them, and checks no values: that is done here, before a kernel starts.
"""

from __future__ import annotations

import ast
import json
import logging
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

from labkit.files import write_text

_COPY = re.compile(r'<div class="labkit-\w+-copy"><style>.*?</style>(.*)</div>', re.DOTALL)
_DRAWN = re.compile(r"(<br>)?<figure.*?</figure>|<svg.*?</svg>", re.DOTALL)
_WIDGET = "application/vnd.jupyter.widget-view+json"
ABOUT: dict[str, Any] = {"question": "", "seconds_cpu": None, "memory_mb": None, "claims": []}
ABOUT |= {"learns": "answers"}  # or "preferences", "prompts": what its `data` must hold
ABOUT |= {"verdicts": []}  # number, claim and verdict of each claim, as last committed


def folder() -> Path:
    """The notebooks' folder: `$LABKIT_NOTEBOOKS`, `notebooks/` of the clone, or the package's."""
    place = Path(os.environ.get("LABKIT_NOTEBOOKS") or shipped("notebooks"))
    if not place.is_dir():
        raise FileNotFoundError(f"no notebooks in {place}: set LABKIT_NOTEBOOKS")
    return place


def shipped(name: str) -> Path:
    """A folder of the clone, or the copy of it in the installed package (see setup.py)."""
    inside = Path(__file__).parent / "shipped" / Path(name).name
    return inside if inside.is_dir() else Path(__file__).parents[1] / name


def available() -> list[SimpleNamespace]:
    """Name, path, title and what is in `ABOUT` of all notebooks, in the order of their names."""
    found = []
    for path in sorted(folder().glob("[0-9]*.ipynb")):
        cells, about = _read(path)
        title = re.search(r"^# (.+)$", cells[0]["source"] if cells else "", re.MULTILINE)
        names = {"name": path.stem, "path": path, "title": title[1] if title else path.stem}
        found.append(SimpleNamespace(**ABOUT | about | names))
    return found


def find(name: str) -> Path:
    """The one called `name`: `02_lora`, `lora`, `02`, how it begins, or a path to an .ipynb file.

    Raises ValueError where none or several are called so.
    """
    if name.endswith(".ipynb") and Path(name).is_file():
        return Path(name)
    paths = sorted(folder().glob("[0-9]*.ipynb"))
    names = {path: (path.stem.lower(), *path.stem.lower().split("_", 1)) for path in paths}
    wanted = Path(name).stem.lower().replace("-", "_")
    wanted = wanted.zfill(2) if wanted.isdigit() else wanted
    found = [p for p in paths if wanted in names[p]]
    found = found or [p for p in paths if names[p][-1].startswith(wanted)]
    if len(found) != 1:
        fault, which = ("several notebooks are", found) if found else ("no notebook is", paths)
        raise ValueError(f"{fault} called {name!r}; there are {', '.join(p.stem for p in which)}")
    return found[0]


def parameters_cell(path: Path) -> str:
    """The source of the cell tagged `parameters`: a line for each, its meaning in a comment."""
    cells = _read(path)[0]
    return "\n".join(c["source"] for c in cells if "parameters" in c["metadata"].get("tags", []))


def limits(path: Path) -> str:
    """The limits of a notebook's parameters, in words."""

    def words(rule: Any) -> str:
        if isinstance(rule, dict):
            return " ".join(f"{key} {value}" for key, value in rule.items())
        if isinstance(rule[0], str):
            return "|".join(rule)
        return f"from {rule[0]}" + (f" to {rule[1]}" if rule[1] is not None else "")

    rules = _read(path)[1].get("limits", {})
    return ", ".join(f"{name} {words(rule)}" for name, rule in rules.items()) or "none"


def parameters(path: Path) -> dict[str, Any]:
    """The names and defaults of a notebook's parameters, from the cell tagged `parameters`.

    The cell is parsed: papermill's `inspect_notebook` skips lines with a second `=`, in a
    comment for instance. Raises `ValueError` for a line that is not `name = literal`.
    """
    found = {}
    for node in ast.parse(parameters_cell(path)).body:
        try:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target  # type: ignore
            found[target.id] = ast.literal_eval(node.value)  # type: ignore
        except (AttributeError, ValueError):
            raise ValueError(f"{path.name}: not `name = literal`: {ast.unparse(node)}") from None
    return found


def renamed(path: Path) -> dict[str, str]:
    """Former names of parameters, from the metadata `labkit.renamed`: `{old: new}`."""
    return _read(path)[1].get("renamed", {})


def validate(values: dict[str, Any], path: Path, *later: dict[str, Any]) -> dict[str, Any]:
    """Check `values` against the notebook's parameters and return them in the right types.

    The entries of `later` win. The type is the default's; limits are in the metadata, and so is
    what must be a multiple of another parameter. A text is converted where the parameter is none.
    Raises `ValueError` naming the parameter, what was expected and what came.
    """
    import yaml
    from pydantic import TypeAdapter, ValidationError

    about, defaults, given = _read(path)[1], parameters(path), {}
    for old, value in (item for source in (values, *later) for item in source.items()):
        name = about.get("renamed", {}).get(old, old)
        if name != old:
            logging.getLogger("labkit").warning("%s: %r is now %r", path.stem, old, name)
        if name not in defaults:
            raise ValueError(f"{path.stem} has no parameter {name!r}; it has {', '.join(defaults)}")
        given[name] = value
    checked = defaults | given
    for name, value in given.items():
        text, default = isinstance(value, str), defaults[name]
        if text and not isinstance(default, (str, int, float)):  # a list, or of any type
            with suppress(yaml.YAMLError):
                checked[name] = yaml.safe_load(value)
        kind = TypeAdapter(_type(default, about.get("limits", {}).get(name)))
        try:
            checked[name] = kind.validate_python(checked[name], strict=not text)
        except ValidationError as error:
            reason = f"{error.errors()[0]['msg']} (default {default!r}); got {value!r}"
            raise ValueError(f"{path.stem}: parameter {name!r}: {reason}") from None
    for name, part in about.get("multiples", {}).items():
        if checked[name] % checked[part]:
            multiple = f"expected a multiple of {part} = {checked[part]}, got {checked[name]}"
            raise ValueError(f"{path.stem}: parameter {name!r}: {multiple}")
    return {name: checked[name] for name in given}


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
    if os.environ.get("WANDB_MODE") == "offline":
        os.environ["WANDB_MODE"] = "dryrun"  # the same, but transformers prints no line about it
    # Other users of the machine must not read what kernel and papermill say.
    private = Config({"KernelManager": {"transport_encryption": "auto"}})
    options = {"kernel_name": "python3", "language": "python", "progress_bar": False}
    options |= {"cwd": cwd, "on_cell_start": on_cell, "config": private}
    # jupyter_client interrupts an idle kernel before it stops it, which the kernel calls an error.
    options |= {"extra_arguments": ["--log-level=CRITICAL"]}
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
        folded = {k: v for k, v in cell.metadata.items() if k == "jupyter"}  # its code, that is
        cell.metadata = nbformat.from_dict(({"tags": tags} if tags else {}) | folded)
        for output in [*cell.get("outputs", [])]:
            data = output.get("data", {})
            if _WIDGET in data or data == {"text/plain": ""}:  # of a widget, its copy is kept
                cell.outputs.remove(output)
            if "image/png" in data:  # GitHub shows no pictures in HTML
                data.pop("text/html", "")
            if "text/html" in data:
                # Without what hides a copy beside its live widget, and without drawings, of which
                # GitHub and JupyterLab leave the captions.
                data["text/html"] = _DRAWN.sub("", _COPY.sub(r"\1", data["text/html"]))
            if "metadata" in output:  # of a picture, its size and what it shows
                kept = {k: v for k, v in output.metadata.items() if k == "image/png"}
                output.metadata = nbformat.from_dict(kept)
    write_text(path, nbformat.writes(nb).rstrip("\n") + "\n")


def keep_verdicts(path: Path, claims: list[dict[str, Any]]) -> None:
    """Write the verdicts of a run's `claims` into the notebook's metadata, for `available`."""
    nb = json.loads(path.read_text("utf-8"))
    names = ("number", "claim", "verdict")
    nb["metadata"]["labkit"]["verdicts"] = [{name: c[name] for name in names} for c in claims]
    write_text(path, json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n")


def _read(path: Path) -> tuple[list[Any], dict[str, Any]]:
    """(cells with their source as text, the metadata `labkit`), without the slow nbformat."""
    try:
        nb = json.loads(path.read_text("utf-8"))
        cells = [cell | {"source": "".join(cell["source"])} for cell in nb["cells"]]
        return cells, nb["metadata"].get("labkit", {})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a notebook of nbformat 4: {error!r}") from error


def _type(default: Any, limits: Any) -> Any:
    """The default's type with its limits, which hold for each item of a list.

    They are [lowest, highest], of which one may be None, a list of texts to choose from, or
    rules of pydantic's `Field`, such as {"gt": 0, "lt": 1} or {"min_length": 1}.
    """
    from pydantic import Field

    if isinstance(default, (list, tuple)):
        same = len({type(item) for item in default}) == 1
        return list[_type(default[0], limits)] if same else list  # type: ignore[misc]
    if isinstance(limits, list) and isinstance(limits[0], str):
        return Literal[tuple(limits)]
    rules = {"ge": limits[0], "le": limits[1]} if isinstance(limits, list) else dict(limits or {})
    if isinstance(default, float):
        rules["allow_inf_nan"] = False
    return Any if default is None else Annotated[type(default), Field(**rules)]
