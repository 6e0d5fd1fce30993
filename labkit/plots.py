"""The figures of the notebooks, in one style. Seeds are shown as mean and standard deviation.

Each function returns a matplotlib Figure that belongs to no window, so a cell that ends in it
shows it exactly once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import cycle
from statistics import fmean, stdev
from typing import Any

COLOURS = ("#2563a8", "#d1603d", "#3c8d5a", "#8a5aa8", "#b08a2e", "#5b6770")
Series = Mapping[str, tuple[Sequence[float], Sequence[Any]]]  # {label: (x values, y values)}
_CJK_FONTS = "Noto Sans CJK SC, Source Han Sans SC, WenQuanYi Micro Hei, PingFang SC, SimHei"
_STYLE: dict[str, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
_STYLE |= {"axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.25}


def loss_curve(
    history: Any, title: str = "Training loss", ylabel: str = "loss (nats per response token)"
) -> Any:
    """Loss against step, from a history of dicts with `step` and `loss`, or several by label."""
    runs = history if isinstance(history, Mapping) else {"": history}
    series = {k: ([e["step"] for e in p], [e["loss"] for e in p]) for k, p in runs.items()}
    return lines(series, xlabel="step", ylabel=ylabel, title=title)


def lines(series: Series, *, logx: bool = False, logy: bool = False, **labels: str) -> Any:
    """One line for each label of `{label: (x values, y values)}`."""
    figure, axes = figure_axes(**labels)
    for (label, (x, y)), colour in zip(series.items(), cycle(COLOURS), strict=False):
        marker = "o" if len(x) <= 20 else None
        axes.plot(x, y, color=colour, label=label, marker=marker, markersize=4, linewidth=1.5)
    return _finished(figure, axes, series, logx, logy)


def sweep(
    x: Sequence[float],
    series: Mapping[str, Sequence[Sequence[float]]],
    *,
    logx: bool = False,
    logy: bool = False,
    reference: Mapping[str, float] | None = None,
    **labels: str,
) -> Any:
    """A hyperparameter's effect, `{label: [values of the seeds, for each x]}`, as mean ± std.

    `reference` draws horizontal lines, such as full fine-tuning in a sweep of ranks.
    """
    figure, axes = figure_axes(**labels)
    for (label, values), colour in zip(series.items(), cycle(COLOURS), strict=False):
        mean, std = zip(*map(_mean_std, values), strict=True)
        axes.errorbar(x, mean, std, color=colour, label=label, marker="o", markersize=4, capsize=3)
    references = reference or {}
    for (label, value), style in zip(references.items(), cycle(("--", ":", "-.")), strict=False):
        axes.axhline(value, color="#333333", linestyle=style, linewidth=1, label=label)
    _finished(figure, axes, {**series, **references}, logx, logy)
    if logx:  # the values that were tried, not powers of ten
        axes.set_xticks(list(x), [f"{v:g}" for v in x])
        axes.minorticks_off()
    return figure


def panels(series: Mapping[str, Series], *, xlabel: str, title: str) -> Any:
    """Small pictures over one x axis, three in a row: `{y label: {label: (x, y)}}`.

    Each y is a number, or the values of the seeds. A label has one colour in all pictures.
    """
    import matplotlib as mpl

    names = dict.fromkeys(label for picture in series.values() for label in picture)
    colours = dict(zip(names, cycle(COLOURS), strict=False))
    columns, rows, shown = min(3, len(series)), -(-len(series) // 3), {}
    with mpl.rc_context(_style()):
        size = (3.1 * columns, 2.3 * rows + 0.4)
        figure = _figure_class()(figsize=size, dpi=100, layout="constrained")
        figure.suptitle(title, fontsize=11)
        for place, (ylabel, picture) in enumerate(series.items(), start=1):
            axes = figure.add_subplot(rows, columns, place, xlabel=xlabel, ylabel=ylabel)
            for label, (x, y) in picture.items():
                mean, std = zip(*map(_mean_std, y), strict=True)
                (shown[label],) = axes.plot(x, mean, color=colours[label], linewidth=1.5)
                low, high = ([m + k * s for m, s in zip(mean, std, strict=True)] for k in (-1, 1))
                axes.fill_between(x, low, high, color=colours[label], alpha=0.15, linewidth=0)
    if any(names):
        options = dict(frameon=False, fontsize=8, loc="outside lower center", ncols=5)
        figure.legend([shown[name] for name in names], names, **options)
    return figure


def bars(values: Mapping[str, Any], *, percent: bool = False, **labels: str) -> Any:
    """Bars of `{label: number or values of the seeds}`, or grouped: `{series: {label: …}}`."""
    grouped = bool(values) and all(isinstance(v, Mapping) for v in values.values())
    groups: dict[str, Mapping[str, Any]] = dict(values) if grouped else {"": values}
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    figure, axes = figure_axes(**labels)
    width = 0.8 / len(groups)
    for i, (name, group) in enumerate(groups.items()):
        places = [names.index(n) + (i - (len(groups) - 1) / 2) * width for n in group]
        mean, std = zip(*map(_mean_std, group.values()), strict=True)
        error, colour = std if any(std) else None, COLOURS[i % len(COLOURS)]
        axes.bar(places, mean, width * 0.95, yerr=error, capsize=3, color=colour, label=name)
    turned = dict(rotation=30, ha="right") if sum(map(len, names)) > 60 else {}
    axes.set_xticks(range(len(names)), names, **turned)
    if percent:
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    return _finished(figure, axes, groups)


def matrix(
    rows: Any, *, xlabels: Sequence[str], ylabels: Sequence[str], label: str, **labels: str
) -> Any:
    """A table of numbers as colours with the numbers written in; `label` names the colours."""
    figure, axes = figure_axes(**labels)
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


def figure_axes(*, title: str, ylabel: str = "", xlabel: str = "") -> tuple[Any, Any]:
    """An empty figure in the notebooks' style, and its axes."""
    import matplotlib as mpl

    with mpl.rc_context(_style()):
        figure = _figure_class()(figsize=(6.4, 3.6), dpi=100, layout="constrained")
        return figure, figure.add_subplot(title=title, xlabel=xlabel, ylabel=ylabel)


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

    installed = {font.name for font in fontManager.ttflist} & {*_CJK_FONTS.split(", ")}
    return _STYLE | {"font.family": ["DejaVu Sans", *sorted(installed)]}


def _mean_std(value: Any) -> tuple[float, float]:
    values = [float(v) for v in value] if isinstance(value, Sequence) else [float(value)]
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def _finished(
    figure: Any, axes: Any, labels: Mapping[str, Any], logx: bool = False, logy: bool = False
) -> Any:
    axes.set(**{"xscale": "log"} if logx else {}, **{"yscale": "log"} if logy else {})
    if any(labels):
        axes.legend(frameon=False, fontsize=8)
    return figure
