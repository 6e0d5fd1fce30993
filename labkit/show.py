"""What notebooks show: tables, texts next to each other, token masks; in HTML all text is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from .templates import Row, prompt_text, response

_TEXT = "text-align:left;vertical-align:top;white-space:pre-wrap"
_NO_LOSS, _LOSS = "border:1px solid #8885;opacity:.65", "border:1px solid #2a6;background:#2a63"


def show(value: Any) -> str:
    """A value as a short text: floats to four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Table:
    """Rows to show in a notebook: HTML with every value escaped, aligned text elsewhere."""

    style = ""

    def __init__(self, rows: list[dict[str, Any]], css_class: str = "labkit-table") -> None:
        self.rows = rows
        self.columns = list(dict.fromkeys(name for row in rows for name in row))
        self.css_class = css_class

    def _cells(self) -> list[list[str]]:
        return [[show(row.get(name, "")) for name in self.columns] for row in self.rows]

    def _repr_html_(self) -> str:
        style = f' style="{self.style}"' if self.style else ""
        lines = [("th", map(str, self.columns)), *(("td", row) for row in self._cells())]
        body = "".join(
            "<tr>" + "".join(f"<{tag}{style}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"
            for tag, cells in lines
        )
        return f'<table class="{self.css_class}">{body}</table>'

    def __repr__(self) -> str:
        cells = [[str(name) for name in self.columns], *self._cells()]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = (" | ".join(map(str.ljust, row, widths)) for row in cells)
        return "\n".join(line.rstrip() for line in lines)


class SideBySide(Table):
    """A table of long texts: line breaks are kept; as plain text one line per cell."""

    style = _TEXT

    def __init__(self, columns: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
        super().__init__([dict(zip(columns, row, strict=True)) for row in cells])
        self.columns = list(columns)

    def __repr__(self) -> str:
        width = max(map(len, self.columns))
        names = [f"{name:>{width}} | " for name in self.columns]
        return "\n\n".join("\n".join(map(str.__add__, names, row)) for row in self._cells())


def side_by_side(
    rows: list[Row], before: Sequence[str], after: Sequence[str], n: int = 5
) -> SideBySide:
    """n rows, spread evenly: prompt, expected answer, answers before and after training."""
    found = list(zip(rows, before, after, strict=True))
    count = min(n, len(rows))
    chosen = [found[j * len(rows) // count] for j in range(count)]
    cells = [(prompt_text(row), response(row), *answers) for row, *answers in chosen]
    return SideBySide(("prompt", "expected", "before", "after"), cells)


class MaskView:
    """Examples as lists of (token text, carries loss); shown coloured."""

    def __init__(self, examples: list[list[tuple[str, bool]]]) -> None:
        self.examples = examples

    def _repr_html_(self) -> str:
        def span(text: str, loss: bool) -> str:
            visible = escape(text).replace("\n", "⏎<br>").replace(" ", "&nbsp;")
            return f'<span style="{_LOSS if loss else _NO_LOSS}">{visible}</span>'

        lines = [[("no loss", False), ("loss", True)], *self.examples]
        return "".join(
            f'<p style="line-height:1.9;text-align:left">{"".join(span(*p) for p in line)}</p>'
            for line in lines
        )

    def __repr__(self) -> str:
        texts = ("".join(f"[{t}]" if loss else t for t, loss in line) for line in self.examples)
        return "\n".join([*texts, "[…] carries loss"])


def show_masks(encoded: Any, tokenizer: Any, n: int = 3) -> MaskView:
    """The first n encoded examples token by token, coloured by whether they carry loss."""
    return MaskView([_pieces(*encoded[i], tokenizer) for i in range(min(n, len(encoded)))])


def _pieces(ids: Any, mask: Any, tokenizer: Any) -> list[tuple[str, bool]]:
    """Token texts; tokens that only together make a character are shown as one."""
    pieces: list[tuple[str, bool]] = []
    start = 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)
        if end == len(ids) or mask[end] != mask[start] or "\ufffd" not in text:
            pieces.append((text, bool(mask[start])))
            start = end
    return pieces
