"""The figures of the notebooks, in one style. Seeds are shown as mean and standard deviation.

Each function returns a matplotlib Figure that belongs to no window, so a cell that ends in it
shows it exactly once. `labels` are the title, xlabel, ylabel, logx and logy of `figure_axes`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from itertools import cycle
from statistics import fmean, stdev
from typing import Any

from labkit.show import keepers

# petroff6 of matplotlib, made to be told apart whatever colours one sees (arXiv:2107.02270)
COLOURS = ("#5790fc", "#f89c20", "#e42536", "#964a8b", "#9c9ca1", "#7a21dd")
DASHES = ("-", "--", "-.", ":", (0, (6, 1)), (0, (3, 1, 1, 1, 1, 1)))
DPI, SCREEN = 200, 100  # sharp on a screen of two dots a pixel, shown at the size of one
Series = Mapping[str, tuple[Sequence[float], Sequence[Any]]]  # {label: (x values, y values)}
Seeds = Mapping[str, Sequence[Any]]  # {label: for each x a number, or the values of the seeds}
_CJK_FONTS = "Noto Sans CJK SC, Source Han Sans SC, WenQuanYi Micro Hei, PingFang SC, SimHei"
_STYLE: dict[str, Any] = {"font.size": 9, "legend.fontsize": 9, "legend.edgecolor": "none"}
_STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
_STYLE |= {"axes.axisbelow": True, "grid.alpha": 0.25, "lines.markersize": 4, "errorbar.capsize": 3}
_STYLE |= {"figure.figsize": (6.4, 3.6), "figure.dpi": DPI, "figure.constrained_layout.use": True}
_STYLE |= {"axes.prop_cycle": f"cycler(color={COLOURS}, linestyle={DASHES})"}


@contextmanager
def _style() -> Iterator[None]:
    """As a decorator: what a function draws, legends and ticks too, has the notebooks' style."""
    import matplotlib as mpl
    from matplotlib.font_manager import fontManager

    cjk = {font.name for font in fontManager.ttflist} & {*_CJK_FONTS.split(", ")}
    with mpl.rc_context(_STYLE | {"font.family": ["DejaVu Sans", *sorted(cjk)]}):
        yield


def _figure(**options: Any) -> Any:
    """A figure that shows itself in a notebook, whether or not pyplot was ever imported."""
    from matplotlib.figure import Figure
    from PIL import Image

    def png() -> tuple[bytes, dict[str, Any]]:
        whole, small = BytesIO(), BytesIO()
        figure.savefig(whole, format="png")
        # Shades of a few hues: a palette of 96 takes a third of the bytes in a notebook.
        image = Image.open(whole).convert("RGB").quantize(96, dither=Image.Dither.NONE)
        image.save(small, format="png", optimize=True)
        titles = (figure.get_suptitle(), *(axes.get_title() for axes in figure.axes))
        title = next(filter(None, titles), "figure")
        for keep in keepers:
            keep(title, image)
        width, height = (size * SCREEN // DPI for size in image.size)
        return small.getvalue(), {"alt": _alt(figure, title), "width": width, "height": height}

    figure: Any = Figure(**options)
    figure._repr_png_ = png
    return figure


def _alt(figure: Any, title: str) -> str:
    """What a figure shows, for readers who do not see it: title, axes and the names of its data."""
    found = dict.fromkeys(f"{a.get_ylabel()} against {a.get_xlabel()}" for a in figure.axes)
    axes = "; ".join(text.removesuffix(" against ").removeprefix(" against ") for text in found)
    names = dict.fromkeys(n for a in figure.axes for n in a.get_legend_handles_labels()[1])
    return ". ".join(filter(None, (title, axes, ", ".join(names)))).replace("\n", " ")


@_style()
def figure_axes(
    *, title: str, ylabel: str = "", xlabel: str = "", logx: bool = False, logy: bool = False
) -> tuple[Any, Any]:
    """An empty figure in the notebooks' style, and its axes."""
    figure = _figure()
    scales = {"xscale": "log" if logx else "linear", "yscale": "log" if logy else "linear"}
    return figure, figure.add_subplot(title=title, xlabel=xlabel, ylabel=ylabel, **scales)


def loss_curve(
    history: Any,
    title: str = "Training loss",
    ylabel: str = "loss (nats per response token)",
    window: int = 1,
) -> Any:
    """Loss against step, from a history of dicts with `step` and `loss`, or several by label.

    Each point is the mean of the last `window` entries: single batches are noisy.
    """
    runs = history if isinstance(history, Mapping) else {"": history}
    series = {}
    for label, entries in runs.items():
        losses = [entry["loss"] for entry in entries]
        means = [fmean(losses[max(0, i - window) : i]) for i in range(1, len(losses) + 1)]
        series[label] = [entry["step"] for entry in entries], means
    return lines(series, xlabel="step", ylabel=ylabel, title=title)


@_style()
def lines(series: Series, **labels: Any) -> Any:
    """One line for each label of `{label: (x values, y values)}`."""
    figure, axes = figure_axes(**labels)
    for label, (x, y) in series.items():
        axes.plot(x, y, label=label, marker="o" if len(x) <= 20 else None)
    return _with_legend(figure, axes)


@_style()
def sweep(x: Sequence[float], series: Seeds, *, reference: Any = None, **labels: Any) -> Any:
    """A hyperparameter's effect, `{label: [values of the seeds, for each x]}`, as mean ± std.

    `reference`, `{label: y}`, draws horizontal lines, such as full fine-tuning's.
    """
    figure, axes = figure_axes(**labels)
    for label, values in series.items():
        axes.errorbar(x, *_mean_std(values), label=label, marker="o")
    styles = cycle(("--", ":", "-."))
    for label, value in (reference or {}).items():
        axes.axhline(value, color="#333333", linestyle=next(styles), linewidth=1, label=label)
    if labels.get("logx"):  # the values that were tried, not powers of ten
        axes.set_xticks(list(x), [f"{v:g}" for v in x])
        axes.minorticks_off()
    return _with_legend(figure, axes)


@_style()
def panels(series: Mapping[str, Series], *, xlabel: str, title: str) -> Any:
    """Small pictures over one x axis, three in a row: `{y label: {label: (x, y)}}`.

    Each y is a number, or the values of the seeds. A label has one colour in all pictures.
    """
    names = dict.fromkeys(label for picture in series.values() for label in picture)
    looks = dict(zip(names, cycle(zip(COLOURS, DASHES, strict=True)), strict=False))
    columns, rows, shown = min(3, len(series)), -(-len(series) // 3), {}
    figure = _figure(figsize=(3.1 * columns, 2.3 * rows + 0.4))
    figure.suptitle(title, fontsize=11)
    for place, (ylabel, picture) in enumerate(series.items(), start=1):
        axes = figure.add_subplot(rows, columns, place, xlabel=xlabel, ylabel=ylabel)
        for label, (x, y) in picture.items():
            mean, std = _mean_std(y)
            colour, dashes = looks[label]
            (shown[label],) = axes.plot(x, mean, color=colour, linestyle=dashes)
            low, high = ([m + k * s for m, s in zip(mean, std, strict=True)] for k in (-1, 1))
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    if named := [name for name in names if name]:
        figure.legend([shown[n] for n in named], named, loc="outside lower center", ncols=5)
    return figure


@_style()
def bars(values: Mapping[str, Any], *, percent: bool = False, **labels: Any) -> Any:
    """Bars of `{label: number or values of the seeds}`, or grouped: `{series: {label: …}}`."""
    grouped = values and all(isinstance(v, Mapping) for v in values.values())
    groups: Mapping[str, Any] = values if grouped else {"": values}
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    figure, axes = figure_axes(**labels)
    width, lowest = 0.8 / len(groups), 0.0
    for i, (label, group) in enumerate(groups.items()):
        places = [names.index(n) + (i - (len(groups) - 1) / 2) * width for n in group]
        mean, std = _mean_std(group.values())
        lowest = min([lowest, *mean])
        axes.bar(places, mean, width * 0.95, yerr=std if any(std) else None, label=label)
    crowded = max(map(len, names), default=0) * len(names) > 80  # characters that fit side by side
    turned = dict(rotation=30, ha="right") if crowded else {}
    axes.set_xticks(range(len(names)), names, **turned)
    if percent:
        axes.set_ylim(1.1 * lowest, 1.02)  # a gold score may be negative
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    return _with_legend(figure, axes, below=True)


@_style()
def corner(
    points: Mapping[str, Sequence[Sequence[float]]], *, best: tuple[float, float], **labels: Any
) -> Any:
    """Shares against shares, `{label: [(x, low, high), (y, low, high)]}`; a star is the `best`."""
    figure, axes = figure_axes(**labels)
    figure.set_size_inches(5.2, 4.4)
    for label, (x, y) in points.items():
        bounds = [[[max(v - low, 0)], [max(high - v, 0)]] for v, low, high in (x, y)]
        axes.errorbar(x[0], y[0], xerr=bounds[0], yerr=bounds[1], marker="o", label=label)
    axes.plot(*best, "*", color="#333333", markersize=14, clip_on=False, label="wanted")
    axes.plot([0, 1], [0, 1], ":", color="#333333", linewidth=1, label="no difference")
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:.0%}")
    return _with_legend(figure, axes)


@_style()
def histograms(pictures: Mapping[str, Mapping[str, Sequence[float]]], *, title: str) -> Any:
    """Shares of values, side by side: `{x label: {label: values}}`; bins are those of all values."""
    figure = _figure(figsize=(3.1 * max(2, len(pictures)), 2.7))
    figure.suptitle(title, fontsize=11)
    for place, (xlabel, values) in enumerate(pictures.items(), start=1):
        axes = figure.add_subplot(1, len(pictures), place, xlabel=xlabel, ylabel="share (%)")
        named = {label: list(found) for label, found in values.items() if len(found)}
        shares = [[100 / len(found)] * len(found) for found in named.values()]
        if named:
            axes.hist(list(named.values()), bins=15, weights=shares, label=list(named))
    return _with_legend(figure, figure.axes[0], below=True)


@_style()
def matrix(
    rows: Any, *, xlabels: Sequence[str], ylabels: Sequence[str], label: str, **labels: Any
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


def _mean_std(values: Iterable[Any]) -> tuple[list[float], list[float]]:
    """Means and standard deviations; each of `values` is a number or the values of the seeds."""
    seeds = [[float(x) for x in (v if isinstance(v, Sequence) else [v])] for v in values]
    return [fmean(xs) for xs in seeds], [stdev(xs) if len(xs) > 1 else 0.0 for xs in seeds]


def _with_legend(figure: Any, axes: Any, below: bool = False) -> Any:
    """`below` the axes, where bars leave no room inside."""
    handles, names = axes.get_legend_handles_labels()
    if names and below:
        figure.legend(handles, names, loc="outside lower center", ncols=4)
    elif names:
        axes.legend()
    return figure
