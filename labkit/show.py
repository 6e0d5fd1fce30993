"""What notebooks show: tables, texts next to each other, token masks; all text is escaped."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from os.path import commonprefix
from typing import Any

from .templates import Row, prompt_text, response

KEPT: dict[Any, str] = {True: "kept", False: "broken"}
KEPT |= {"holds": "kept", "does not hold here": "broken"}
SIGNS = {"holds": "✔", "holds in part": "◐", "does not hold here": "✘"}
_NUMBER = re.compile(r"[-+−]?[\d,.]*(e[-+]\d+)?%?(\s±\s[\d,.]+%?)?|nan|inf")
# Tags that GitHub keeps, colours where they are let through.
_NO_LOSS = '<span style="opacity:.65">{}</span>'
_LOSS = '<ins><b style="font-weight:normal;background:#2a63">{}</b></ins>'


def show(value: Any) -> str:
    """A value as a short text: floats to four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _texts(values: list[Any]) -> list[str]:
    """A column: floats of like size with as many decimals as give the largest four digits."""
    sizes = [abs(v) for v in values if isinstance(v, float) and v and math.isfinite(v)]
    if not sizes or max(sizes) > 100 * min(sizes):
        return [*map(show, values)]
    decimals = max(0, 3 - math.floor(math.log10(max(sizes))))
    return [f"{v:,.{decimals}f}" if isinstance(v, float) else show(v) for v in values]


# The open run's `keep`: called with a name and the figure or table of texts that a notebook shows.
keepers: list[Callable[[str, Any], Any]] = []


class Table:
    """Rows to show in a notebook: HTML with every value escaped, aligned text elsewhere."""

    style = ""

    def __init__(self, rows: list[dict[str, Any]], css_class: str = "labkit-table") -> None:
        self.rows, self.css_class = rows, css_class
        self.columns = list(dict.fromkeys(name for row in rows for name in row))

    def cells(self) -> list[list[str]]:
        columns = [_texts([row.get(name, "") for row in self.rows]) for name in self.columns]
        return [*map(list, zip(*columns, strict=True))]

    def _repr_html_(self) -> str:
        cells = self.cells()
        numbers = (all(map(_NUMBER.fullmatch, column)) for column in zip(*cells, strict=True))
        sides = ["right" if number and not self.style else "left" for number in numbers]

        def line(tag: str, texts: Iterable[str]) -> str:
            cells = ""
            for side, text in zip(sides, texts, strict=True):
                style = f"text-align:{side};{self.style}"  # GitHub keeps `align`, others `style`
                scope = ' scope="col"' if tag == "th" else ""
                text = f"{SIGNS[text]} {text}" if text in SIGNS else text
                cells += f'<{tag}{scope} align="{side}" style="{style}">{escape(text)}</{tag}>'
            return f"<tr>{cells}</tr>"

        body = "".join(line("td", row) for row in cells)
        head = f"<thead>{line('th', map(str, self.columns))}</thead>"
        return f'<table class="{self.css_class}">{head}<tbody>{body}</tbody></table>'

    def __repr__(self) -> str:
        lines = [[str(name) for name in self.columns], *self.cells()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(" | ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


class SideBySide(Table):
    """A table of long texts: line breaks are kept; as plain text, one line per cell.

    The open run keeps in its record what a notebook shows of it.
    """

    style = "vertical-align:top;white-space:pre-wrap"

    def __init__(self, columns: Sequence[str], cells: Iterable[Sequence[str]]) -> None:
        whole = ([text.replace("\ufffd", "") for text in row] for row in cells)  # no half character
        super().__init__([dict(zip(columns, row, strict=True)) for row in whole])

    def _repr_html_(self) -> str:
        for keep in keepers:
            keep("samples", self)
        return super()._repr_html_()

    def __repr__(self) -> str:
        names = [f"{name:>8} | " for name in self.columns]
        return "\n\n".join("\n".join(map(str.__add__, names, row)) for row in self.cells())


def outcomes(rows: Iterable[tuple[str, object, bool | str]]) -> Table:
    """What was predicted, what was measured, and whether that keeps the prediction: a truth value,
    or a verdict of `evaluation.decide`.
    """
    names = ("predicted", "measured", "")
    words = ((said, found, KEPT.get(kept, str(kept))) for said, found, kept in rows)
    return Table([dict(zip(names, row, strict=True)) for row in words])


def samples(rows: list[Row], answers: Mapping[str, Sequence[str]], n: int = 8) -> Table:
    """Prompts, expected answers, and those of models by name, to n of the rows.

    One row of each family (`task`) at most. Where answers are marked (✓, ✗), up to half of those
    that are shown are such that the last model gets wrong.
    """
    *_, last = answers.values()
    right = [not text.startswith("✗") for text in last]
    kinds = {rows[i].get("task", i): i for i in sorted(range(len(rows)), key=lambda i: -right[i])}
    places, half = sorted(kinds.values(), key=right.__getitem__), n // 2
    places = places[:half] + places[half:][half - n :]
    shown = [rows[i] for i in places]
    columns = {"family": [row["task"] for row in shown]} if "task" in shown[0] else {}
    columns |= {"prompt": [*map(prompt_text, shown)], "expected": [*map(response, shown)]}
    columns |= {name: [texts[i] for i in places] for name, texts in answers.items()}
    return SideBySide([*columns], zip(*columns.values(), strict=True))


class MaskView:
    """Examples as lists of (token text, carries loss), coloured."""

    def __init__(self, examples: list[list[tuple[str, bool]]]) -> None:
        self.examples = examples

    def _repr_html_(self) -> str:
        page, style = "", "line-height:1.9;text-align:left;white-space:pre-wrap"
        for line in [[("no loss", False), (" ", False), ("loss", True)], *self.examples]:
            tokens = ((_LOSS if loss else _NO_LOSS, t.replace("\n", "⏎\n")) for t, loss in line)
            page += f'<p style="{style}">{"".join(tag.format(escape(t)) for tag, t in tokens)}</p>'
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
