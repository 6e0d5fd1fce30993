"""Values as JSON holds them, files that are replaced whole, and where a model is."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def plain(value: Any) -> Any:
    """`value` as JSON holds it: tensors and arrays as lists, NaN and infinity as text."""
    from pydantic_core import to_json

    def other(x: Any) -> Any:
        return x.tolist() if hasattr(x, "tolist") else str(x)

    return json.loads(to_json(value, inf_nan_mode="strings", fallback=other))


def model_place(model: str | Path) -> str:
    """The folder or file of a path or of "tinytown"; a hub id, `owner/name`, as it is.

    Raises FileNotFoundError for a path with nothing there, and for a folder without a model.
    """
    base = Path(__file__).parent / "tinytown" / "base"
    place = base if model == "tinytown" else Path(model).expanduser()
    if place.is_dir() and not (place / "config.json").is_file():
        raise FileNotFoundError(f"model: {place} has no config.json (adapters: see load_adapter)")
    if place.exists():
        return str(place)
    if place.is_absolute() or str(model).startswith(".") or str(model).count("/") > 1:
        raise FileNotFoundError(f"model: there is no {place}")
    return str(model)


def write_text(file: Path, text: str) -> None:
    """Replace `file` atomically: written next to it, flushed to the disk, then renamed."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
