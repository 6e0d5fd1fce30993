"""Tables for notebooks: HTML with every value escaped, aligned text elsewhere."""

from __future__ import annotations

from html import escape
from typing import Any


class Table:
    """Rows (dicts) to show in a notebook."""

    def __init__(self, rows: list[dict[str, Any]], css_class: str = "labkit-table") -> None:
        self.rows = rows
        self.columns = list(dict.fromkeys(name for row in rows for name in row))
        self._css_class = css_class

    def cells(self) -> list[list[str]]:
        return [[show(row.get(name, "")) for name in self.columns] for row in self.rows]

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(str(name))}</th>" for name in self.columns)
        rows = ("".join(f"<td>{escape(text)}</td>" for text in row) for row in self.cells())
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        return f'<table class="{self._css_class}"><tr>{head}</tr>{body}</table>'

    def __repr__(self) -> str:
        cells = [self.columns, *self.cells()]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = (" | ".join(t.ljust(w) for t, w in zip(row, widths, strict=True)) for row in cells)
        return "\n".join(line.rstrip() for line in lines)


def show(value: Any) -> str:
    """A value as a short text: floats to four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
