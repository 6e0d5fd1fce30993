"""What notebooks show: tables, texts next to each other, token masks; all text is escaped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from os.path import commonprefix
from typing import Any

from .templates import Row, prompt_text, response

_MASKS = ("border:1px solid #8885;opacity:.65", "border:1px solid #2a6;background:#2a63")

_MASK_LINE = "line-height:1.9;text-align:left;white-space:pre-wrap"


def show(value: Any) -> str:
    """A value as a short text: floats to four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# The open run's `keep`: called with a name and the figure or table of texts that a notebook shows.
keepers: list[Callable[[str, Any], Any]] = []


class Table:
    """Rows to show in a notebook: HTML with every value escaped, aligned text elsewhere."""

    style = ""

    def __init__(self, rows: list[dict[str, Any]], css_class: str = "labkit-table") -> None:
        self.rows, self.css_class = rows, css_class
        self.columns = list(dict.fromkeys(name for row in rows for name in row))

    def cells(self) -> list[list[str]]:
        return [[show(row.get(name, "")) for name in self.columns] for row in self.rows]

    def _repr_html_(self) -> str:
        body, style = "", f' style="{self.style}"' if self.style else ""
        for tag, line in [("th", map(str, self.columns)), *(("td", row) for row in self.cells())]:
            cells = (f"<{tag}{style}>{escape(cell)}</{tag}>" for cell in line)
            body += f"<tr>{''.join(cells)}</tr>"
        return f'<table class="{self.css_class}">{body}</table>'

    def __repr__(self) -> str:
        lines = [[str(name) for name in self.columns], *self.cells()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(" | ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


class SideBySide(Table):
    """A table of long texts: line breaks are kept; as plain text, one line per cell.

    The open run keeps in its record what a notebook shows of it.
    """

    style = "text-align:left;vertical-align:top;white-space:pre-wrap"

    def __init__(self, columns: Sequence[str], cells: Iterable[Sequence[str]]) -> None:
        super().__init__([dict(zip(columns, row, strict=True)) for row in cells])

    def _repr_html_(self) -> str:
        for keep in keepers:
            keep("samples", self)
        return super()._repr_html_()

    def __repr__(self) -> str:
        names = [f"{name:>8} | " for name in self.columns]
        return "\n\n".join("\n".join(map(str.__add__, names, row)) for row in self.cells())


def side_by_side(
    rows: list[Row],
    before: Sequence[str],
    after: Sequence[str],
    n: int = 5,
    own_form: Sequence[str] = (),
) -> Table:
    """n rows, spread evenly: prompt, expected answer, answers before and after training.

    `own_form`: answers before training to the same questions in a form that the model knows.
    """
    columns = {"before": before} | ({"before, in own form": own_form} if own_form else {})
    columns["after"] = after
    every = list(zip(rows, *columns.values(), strict=True))
    some = [every[j * len(rows) // n] for j in range(n)] if n < len(rows) else every
    cells = [(prompt_text(row), response(row), *answers) for row, *answers in some]
    return SideBySide(("prompt", "expected", *columns), cells)


class MaskView:
    """Examples as lists of (token text, carries loss), coloured."""

    def __init__(self, examples: list[list[tuple[str, bool]]]) -> None:
        self.examples = examples

    def _repr_html_(self) -> str:
        page = ""
        for line in [[("no loss", False), ("loss", True)], *self.examples]:
            texts = (escape(text.replace("\n", "⏎\n")) for text, _ in line)
            styles = (_MASKS[loss] for _, loss in line)
            spans = map('<span style="{}">{}</span>'.format, styles, texts)
            page += f'<p style="{_MASK_LINE}">{"".join(spans)}</p>'
        return page

    def __repr__(self) -> str:
        lines = ("".join(f"[{t}]" if loss else t for t, loss in line) for line in self.examples)
        return "\n".join([*lines, "[…] carries loss"])


def show_masks(encoded: Any, tokenizer: Any, n: int = 3) -> MaskView:
    """The first n encoded examples token by token, coloured by whether they carry loss.

    A token's text is what it adds to the text before it: alone, "▁word" would lose its space.
    """
    examples: list[list[tuple[str, bool]]] = []
    for ids, mask in encoded[:n]:
        examples.append([])
        whole, start, shown = tokenizer.decode(ids, clean_up_tokenization_spaces=False), 0, 0
        for end in range(1, len(ids) + 1):
            text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
            # Tokens that only together make a character are shown as one.
            if whole.startswith(text) or mask[end] != mask[start]:
                known = len(commonprefix([text, whole]))
                examples[-1].append((whole[shown:known], bool(mask[start])))
                start, shown = end, max(shown, known)
    return MaskView(examples)
