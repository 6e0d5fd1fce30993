"""Values as JSON holds them, and files that are replaced whole."""

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
