"""Reads local data files into rows, with errors that name the file and the line.

JSON, JSONL and CSV (also .gz) are read here and not by `datasets`, whose errors do not say
which line is broken; Parquet goes through pyarrow. What the rows mean is `formats.py`'s affair.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from pathlib import Path
from typing import Any

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


def suffix(path: Path | str) -> str:
    """The suffix that decides the format, lower case, a trailing `.gz` left aside."""
    name = Path(path).name.lower().removesuffix(".gz")
    return Path(name).suffix


def read(path: Path | str) -> list[dict[str, Any]]:
    """All rows of a .json, .jsonl, .csv (each also .gz) or .parquet file, in file order.

    Raises FileNotFoundError for a missing file, ValueError for a folder, an unknown suffix, an
    empty file, a file that is not UTF-8 or not valid; both name the file, and the line if known.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise ValueError(f"data: expected a file, got the folder {path}; name a file in it")
    if not path.exists():
        raise FileNotFoundError(
            f"data: expected a file, but {path} does not exist (looked from {Path.cwd()}); "
            "check the spelling, or give the full path"
        )
    kind = suffix(path)
    if kind not in SUFFIXES:
        raise ValueError(
            f"data: expected a file ending in {', '.join(SUFFIXES)} (or .gz of these), got {path}"
        )
    if kind == ".parquet":
        rows = _parquet(path)
    else:
        text = _text(path)
        if not text.strip():
            raise ValueError(f"data: {path} is empty; expected at least one row")
        rows = {".json": _json, ".jsonl": _jsonl, ".csv": _csv}[kind](text, path)
    if not rows:
        raise ValueError(f"data: {path} holds no rows; expected at least one")
    return rows


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        if path.suffix.lower() == ".gz":
            raw = gzip.decompress(raw)
        return raw.decode("utf-8-sig")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"data: {path} is not a whole gzip file ({error}); fetch it again"
        ) from error
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ValueError(
            f"data: {path}, line {line}: expected UTF-8 text, got the byte "
            f"0x{raw[error.start]:02x}; save the file as UTF-8"
        ) from error


def _jsonl(text: str, path: Path) -> list[dict[str, Any]]:
    rows = []
    # Only \n ends a line: str.splitlines would also cut at U+2028 inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"data: {path}, line {number}: malformed JSON ({error.msg} at column "
                f"{error.colno}); expected one JSON object a line, got {_short(line)}"
            ) from error
        rows.append(_object(row, f"{path}, line {number}"))
    return rows


def _json(text: str, path: Path) -> list[dict[str, Any]]:
    """A list of objects, one object with such a list under `data`, or JSON lines (as BELLE)."""
    start = text.lstrip()[0]
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if start == "{" and error.msg == "Extra data":
            return _jsonl(text, path)
        raise ValueError(
            f"data: {path}, line {error.lineno}: malformed JSON ({error.msg} at column "
            f"{error.colno}); expected a list of objects"
        ) from error
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if isinstance(value, dict):
        return [value]
    if not isinstance(value, list):
        raise ValueError(f"data: {path}: expected a list of objects, got {type(value).__name__}")
    return [_object(row, f"{path}, row {n}") for n, row in enumerate(value, start=1)]


def _csv(text: str, path: Path) -> list[dict[str, Any]]:
    rows = []
    previous = csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(
                    f"data: {path}, line {reader.line_num}: expected "
                    f"{len(reader.fieldnames or [])} columns as in the header, got "
                    f"{'more' if None in row else 'fewer'}; quote texts that hold commas"
                )
            rows.append(row)
    except csv.Error as error:
        raise ValueError(
            f"data: {path}, line {reader.line_num}: malformed CSV ({error})"
        ) from error
    finally:
        csv.field_size_limit(previous)
    return rows


def _parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        if path.stat().st_size == 0:
            raise ValueError(f"data: {path} is empty; expected at least one row") from error
        raise ValueError(f"data: {path} is not a Parquet file ({error})") from error


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(
            f"data: {where}: expected an object with named columns, got {_short(repr(value))}"
        )
    return value


def _short(text: str, width: int = 60) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
