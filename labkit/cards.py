"""A data set as a folder: JSON lines that `data.load` reads, and a card that says what they are."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from labkit.formats import Row
from labkit.record import write_text

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
    languages = Counter(row["lang"] for row in rows if "lang" in row)
    head = [
        "---",
        *(["language:", *(f"- {lang}" for lang in sorted(languages))] if languages else []),
    ]
    head += [
        "configs:",
        "- config_name: default",
        "  data_files: data.jsonl",
        "---",
        f"# {title}",
        "",
    ]
    counts = ", ".join(f"{count:,} {lang}" for lang, count in sorted(languages.items()))
    head += [f"{len(rows):,} rows{f' ({counts})' if counts else ''} in `data.jsonl`."]
    head += [
        f"Columns: {', '.join(f'`{k}`' for k in dict.fromkeys(k for row in kept for k in row))}."
    ]
    for name, content in sections.items():
        if not isinstance(content, str):
            cells = (f"| {k} | {' '.join(str(v).split())} |" for k, v in content.items())
            content = "\n".join(["| | |", "| --- | --- |", *cells])
        head += ["", f"## {name}", "", content]
    file = Path(folder) / "data.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
    write_text(file, "".join(lines))
    write_text(file.with_name("README.md"), "\n".join(head) + "\n")
    return file
