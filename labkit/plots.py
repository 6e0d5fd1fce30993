"""The figures of the notebooks: one small consistent style, titles and units on every axis.

Each function returns a matplotlib Figure that belongs to no window and no global state, so a
cell that ends in it shows it exactly once. Values repeated over seeds come with error bars
(mean and standard deviation).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from statistics import fmean, stdev
from typing import Any

COLOURS = ("#2563a8", "#d1603d", "#3c8d5a", "#8a5aa8", "#b08a2e", "#5b6770")
_CJK_FONTS = (
    "Noto Sans CJK SC",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "PingFang SC",
    "SimHei",
)


def loss_curve(
    history: list[dict[str, Any]] | Mapping[str, list[dict[str, Any]]],
    *,
    key: str = "loss",
    title: str = "Training loss",
    ylabel: str = "loss (nats per response token)",
) -> Any:
    """Loss against step, from a history of dicts with `step` and `key`, or several by label."""
    runs = history if isinstance(history, Mapping) else {"": history}
    series = {}
    for label, rows in runs.items():
        points = [(row["step"], row[key]) for row in rows if key in row]
        if not points:
            raise ValueError(f"history {label!r} has no row with {key!r}; did the training log?")
        series[label] = ([x for x, _ in points], [y for _, y in points])
    return lines(series, xlabel="step", ylabel=ylabel, title=title)


def lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    xlabel: str,
    ylabel: str,
    title: str,
    logx: bool = False,
    logy: bool = False,
) -> Any:
    """One line for each label of `{label: (x values, y values)}`."""
    figure, axes = _axes(xlabel, ylabel, title)
    for (label, (x, y)), colour in zip(series.items(), _colours(len(series)), strict=True):
        if len(x) != len(y):
            raise ValueError(f"series {label!r} has {len(x)} x values and {len(y)} y values")
        marker = "o" if len(x) <= 20 else None
        axes.plot(x, y, color=colour, label=label, marker=marker, markersize=4, linewidth=1.5)
    _scales(axes, logx, logy)
    return _legend(figure, axes, series)


def sweep(
    x: Sequence[float],
    series: Mapping[str, Sequence[Sequence[float]]],
    *,
    xlabel: str,
    ylabel: str,
    title: str,
    logx: bool = False,
    logy: bool = False,
    reference: Mapping[str, float] | None = None,
) -> Any:
    """A dial against a result: `{label: [values of the seeds, for each x]}` as mean ± std.

    `reference` draws dashed horizontal lines, such as full fine-tuning beside a rank sweep.
    """
    figure, axes = _axes(xlabel, ylabel, title)
    for (label, values), colour in zip(series.items(), _colours(len(series)), strict=True):
        if len(values) != len(x):
            raise ValueError(f"series {label!r} has {len(values)} entries for {len(x)} x values")
        mean, spread = zip(*(_mean_std(v) for v in values), strict=True)
        axes.errorbar(
            x, mean, yerr=spread, color=colour, label=label, marker="o", markersize=4, capsize=3
        )
    for (label, value), style in zip((reference or {}).items(), _dashes(), strict=False):
        axes.axhline(value, color="#333333", linestyle=style, linewidth=1, label=label)
    _scales(axes, logx, logy)
    if logx:  # the values that were tried, not powers of ten
        axes.set_xticks(list(x), [f"{v:g}" for v in x])
        axes.minorticks_off()
    return _legend(figure, axes, {**series, **(reference or {})})


def panels(
    series: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[Any]]]],
    *,
    xlabel: str,
    title: str,
    columns: int = 3,
) -> Any:
    """Small pictures side by side over one x axis: `{y label: {label: (x, y)}}`.

    Each y is a number, or the values of the seeds: then the line is their mean, with a band of a
    standard deviation to each side. A label has the same colour in every picture.
    """
    import matplotlib as mpl

    labels = list(dict.fromkeys(label for picture in series.values() for label in picture))
    colours = dict(zip(labels, _colours(len(labels)), strict=True))
    columns = min(columns, len(series))
    rows = -(-len(series) // columns)
    with mpl.rc_context(_style()):
        figure = _figure_class()(figsize=(3.1 * columns, 2.3 * rows + 0.4), dpi=100, layout="constrained")  # fmt: skip
        figure.suptitle(title, fontsize=11)
        grid = list(figure.subplots(rows, columns, squeeze=False, sharex=True).flat)
        for axes in grid[len(series) :]:
            axes.remove()
        for axes, (ylabel, picture) in zip(grid, series.items(), strict=False):
            axes.set_ylabel(ylabel)
            axes.set_xlabel(xlabel)
            axes.tick_params(labelbottom=True)
            for label, (x, y) in picture.items():
                _band(axes, x, y, label, colours[label])
    if labels != [""]:
        lines = {line.get_label(): line for axes in figure.axes for line in axes.lines}
        figure.legend([lines[name] for name in labels], labels, frameon=False, fontsize=8,
                      loc="outside lower center", ncols=min(len(labels), 5))  # fmt: skip
    return figure


def _band(axes: Any, x: Sequence[float], y: Sequence[Any], label: str, colour: str) -> None:
    if len(x) != len(y):
        raise ValueError(f"series {label!r} has {len(x)} x values and {len(y)} y values")
    mean, spread = zip(*map(_mean_std, y), strict=True)
    axes.plot(x, mean, color=colour, label=label, linewidth=1.5)
    if any(spread):
        low, high = ([m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def bars(
    values: Mapping[str, Any],
    *,
    ylabel: str,
    title: str,
    xlabel: str = "",
    percent: bool = False,
) -> Any:
    """Bars of `{label: number or values of the seeds}`, or grouped: `{series: {label: …}}`.

    `percent` is for shares between 0 and 1: they are shown as percentages.
    """
    grouped = bool(values) and all(isinstance(v, Mapping) for v in values.values())
    groups: dict[str, Mapping[str, Any]] = dict(values) if grouped else {"": values}
    labels = list(dict.fromkeys(label for group in groups.values() for label in group))
    figure, axes = _axes(xlabel, ylabel, title)
    width = 0.8 / max(1, len(groups))
    for i, ((name, group), colour) in enumerate(
        zip(groups.items(), _colours(len(groups)), strict=True)
    ):
        places = [labels.index(label) + (i - (len(groups) - 1) / 2) * width for label in group]
        mean, spread = zip(*(_mean_std(v) for v in group.values()), strict=True)
        error = spread if any(spread) else None
        axes.bar(places, mean, width * 0.95, yerr=error, capsize=3, color=colour, label=name)
    long = sum(map(len, labels)) > 60
    axes.set_xticks(range(len(labels)), labels, rotation=30 if long else 0, ha="right" if long else "center")  # fmt: skip
    if percent:
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    return _legend(figure, axes, groups)


def matrix(
    rows: Sequence[Sequence[float]],
    *,
    xlabels: Sequence[str],
    ylabels: Sequence[str],
    title: str,
    label: str,
    xlabel: str = "",
    ylabel: str = "",
) -> Any:
    """A table of numbers as colours with the numbers written in; `label` names the colours."""
    if len(rows) != len(ylabels) or any(len(row) != len(xlabels) for row in rows):
        raise ValueError(
            f"rows must be {len(ylabels)} × {len(xlabels)} as the labels are; "
            f"got {len(rows)} rows of lengths {sorted({len(row) for row in rows})}"
        )
    figure, axes = _axes(xlabel, ylabel, title)
    axes.grid(False)
    image = axes.imshow(rows, aspect="auto", cmap="Blues")
    middle = (image.norm.vmin + image.norm.vmax) / 2
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            colour = "white" if value > middle else "black"
            axes.text(x, y, f"{value:.3g}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(xlabels)), xlabels)
    axes.set_yticks(range(len(ylabels)), ylabels)
    figure.colorbar(image, ax=axes, label=label)
    return figure


@cache
def _figure_class() -> type:
    from matplotlib.figure import Figure

    class LabFigure(Figure):
        """Shows itself in a notebook, whether or not pyplot was ever imported."""

        def _repr_png_(self) -> bytes:
            from io import BytesIO

            from PIL import Image

            buffer, small = BytesIO(), BytesIO()
            self.savefig(buffer, format="png")
            # Shades of a few hues: a palette of 96 takes a third of the bytes in a notebook.
            image = Image.open(buffer).convert("RGB").quantize(96, dither=Image.Dither.NONE)
            image.save(small, format="png", optimize=True)
            return small.getvalue()

    return LabFigure


@cache
def _style() -> dict[str, Any]:
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return {
        "font.family": ["DejaVu Sans", *(name for name in _CJK_FONTS if name in installed)],
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.alpha": 0.25,
    }


def _axes(xlabel: str, ylabel: str, title: str) -> tuple[Any, Any]:
    import matplotlib as mpl

    with mpl.rc_context(_style()):
        figure = _figure_class()(figsize=(6.4, 3.6), dpi=100, layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
    return figure, axes


def _mean_std(value: Any) -> tuple[float, float]:
    values = [float(v) for v in value] if isinstance(value, Sequence) else [float(value)]
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _dashes() -> tuple[str, ...]:
    return ("--", ":", "-.")


def _scales(axes: Any, logx: bool, logy: bool) -> None:
    if logx:
        axes.set_xscale("log")
    if logy:
        axes.set_yscale("log")


def _legend(figure: Any, axes: Any, labels: Mapping[str, Any]) -> Any:
    if any(labels):
        axes.legend(frameon=False, fontsize=8)
    return figure
