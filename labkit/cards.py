"""A data set as a folder: JSON lines that `data.load` reads, and a card that says what they are."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from labkit.files import write_text
from labkit.formats import Row

Section = str | Mapping[str, Any]  # a text, or a table of two columns


def save(
    rows: Sequence[Row],
    folder: str | Path,
    title: str,
    sections: Mapping[str, Section],
    columns: Sequence[str] = (),
) -> Path:
    """Writes `data.jsonl` and its card `README.md`; returns the path of the former.

    `columns` are written of each row that has them, by default all. The card counts rows by
    language, if they have one, and has one heading for each of `sections`. Raises ValueError
    without rows.
    """
    if not rows:
        raise ValueError("rows: expected at least one row to write, got none")
    kept = [{k: row[k] for k in columns or row if k in row} for row in rows]
    names = ", ".join(f"`{name}`" for name in dict.fromkeys(name for row in kept for name in row))
    languages = sorted(Counter(row["lang"] for row in rows if "lang" in row).items())
    counts = ", ".join(f"{count:,} {lang}" for lang, count in languages)
    card = ["---", *(["language:"] if languages else []), *(f"- {lang}" for lang, _ in languages)]
    card += ["configs:", "- config_name: default", "  data_files: data.jsonl", "---"]
    count = f"{len(rows):,} rows ({counts})" if counts else f"{len(rows):,} rows"
    card += [f"# {title}", "", f"{count} in `data.jsonl`.", f"Columns: {names}."]
    for name, content in sections.items():
        if not isinstance(content, str):
            cells = (f"| {k} | {' '.join(str(v).split())} |" for k, v in content.items())
            content = "\n".join(["| | |", "| --- | --- |", *cells])
        card += ["", f"## {name}", "", content]
    file = Path(folder) / "data.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
    write_text(file.with_name("README.md"), "\n".join(card) + "\n")
    return file
