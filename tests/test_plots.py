"""Figures: labelled, small, and true to the numbers they were given."""

from itertools import combinations

import numpy as np
import pytest

from labkit import plots

LABELS = dict(xlabel="rank", ylabel="accuracy", title="A sweep")
FIGURES = {
    "loss_curve": lambda: plots.loss_curve([{"step": i, "loss": 3.0 - i} for i in range(20)]),
    "lines": lambda: plots.lines({"a": ([1, 2], [3, 4])}, logy=True, **LABELS),
    "sweep": lambda: plots.sweep([1, 2], {"a": [[0.1, 0.2], [0.3]]}, **LABELS),
    "bars": lambda: plots.bars({"a": 1.0, "b": [1.0, 2.0]}, **LABELS),
    "matrix": lambda: plots.matrix([[1, 2]], xlabels="ab", ylabels="c", label="n", **LABELS),
}


@pytest.mark.parametrize("kind", FIGURES)
def test_every_figure_is_labelled_small_and_leaves_no_window(kind):
    import matplotlib.pyplot as plt

    figure = FIGURES[kind]()
    axes = figure.axes[0]
    assert axes.get_title() and axes.get_xlabel() and axes.get_ylabel()
    png, about = figure._repr_png_()
    assert png.startswith(b"\x89PNG") and len(png) < 60_000
    assert int.from_bytes(png[16:20], "big") == 2 * about["width"] == 2 * 640  # sharp where 2 dots
    assert all(text in about["alt"] for text in (axes.get_title(), axes.get_ylabel()))
    assert plt.get_fignums() == []


def test_a_sweep_draws_mean_and_standard_deviation_at_the_values_tried():
    values = {"LoRA": [[0.2, 0.4], [0.5, 0.7]]}
    axes = plots.sweep([1, 8], values, logx=True, reference={"full": 0.9}, **LABELS).axes[0]
    ((line, _, (bars,)),) = axes.containers
    assert list(line.get_ydata()) == pytest.approx([0.3, 0.6])
    low, high = bars.get_segments()[0][:, 1]
    assert (high - low) / 2 == pytest.approx(0.2 / 2**0.5)  # of 0.2 and 0.4
    assert [t.get_text() for t in axes.get_xticklabels()] == ["1", "8"]
    assert {t.get_text() for t in axes.get_legend().get_texts()} == {"LoRA", "full"}


def test_a_loss_curve_is_smoothed_over_the_last_steps_only():
    history = [{"step": i, "loss": loss} for i, loss in enumerate([4.0, 2.0, 0.0])]
    (line,) = plots.loss_curve(history, window=2).axes[0].lines
    assert list(line.get_ydata()) == [4.0, 3.0, 1.0] and list(line.get_xdata()) == [0, 1, 2]


def test_panels_have_one_colour_per_label_and_a_band_over_seeds():
    first = {"a": ([1, 2], [[0.0, 2.0], [1.0, 3.0]]), "b": ([1], [5.0])}
    pictures = {"reward": first, "KL (nats)": {"b": ([1, 2], [3.0, 4.0])}}
    left, right = plots.panels(pictures, xlabel="step", title="Both").axes
    assert [axes.get_ylabel() for axes in (left, right)] == list(pictures)
    low, high = left.collections[0].get_paths()[0].get_extents().intervaly
    assert (low, high) == pytest.approx((1 - 2**0.5, 2 + 2**0.5))
    assert left.lines[1].get_color() == right.lines[0].get_color() != left.lines[0].get_color()


def test_grouped_bars_keep_the_heights_and_a_negative_one_is_drawn():
    values = {"base": {"en": 0.1, "zh": 0.2}, "tuned": {"en": 0.8, "zh": 0.7}}
    labels = dict(ylabel="accuracy", title="t", percent=True)
    assert plots.bars({"a": -0.2, "b": 0.5}, **labels).axes[0].get_ylim()[0] < -0.2
    axes = plots.bars(values, **labels).axes[0]
    assert axes.get_ylim()[0] == 0
    assert [patch.get_height() for patch in axes.patches] == [0.1, 0.2, 0.8, 0.7]
    assert axes.yaxis.get_major_formatter()(0.5, 0) == "50%"


def test_every_text_of_a_figure_can_be_chinese(monkeypatch):
    monkeypatch.setattr(plots, "_CJK_FONTS", "DejaVu Serif, Not Installed")
    axes = plots.bars({"河边": {"磨坊": 1.0}, "b": {"磨坊": 2.0}}, title="t", ylabel="y").axes[0]
    legend = axes.figure.legends[0]
    for text in (axes.title, legend.get_texts()[0], axes.get_xticklabels()[0]):
        assert text.get_fontfamily() == ["DejaVu Sans", "DejaVu Serif"]


def test_values_that_do_not_match_their_axis_are_refused():
    with pytest.raises(ValueError):
        plots.sweep([1, 2], {"a": [[1]]}, **LABELS)


def test_histograms_are_shares_with_common_bins():
    figure = plots.histograms({"length": {"a": [1, 2, 2], "b": [9]}, "x": {"a": []}}, title="Two")
    left, right = figure.axes
    assert left.get_xlabel() == "length" and len(left.containers) == 2
    sums = [sum(bar.get_height() for bar in bars) for bars in left.containers]
    assert sums == pytest.approx([100, 100])
    assert not right.containers and figure._repr_png_()[0].startswith(b"\x89PNG")


def test_colours_are_those_made_to_be_told_apart_whatever_colours_one_sees():
    import matplotlib as mpl

    style = mpl.style.library["petroff6"]
    assert plots.COLOURS == tuple(style["axes.prop_cycle"].by_key()["color"])


def test_lines_are_told_apart_without_colours():
    found = plots.lines({name: ([1, 2], [3, 4]) for name in "abcdef"}, **LABELS).axes[0].lines
    assert len({str(line._dash_pattern) for line in found}) == 6


# Machado, Oliveira and Fernandes 2009, table 1, severity 1: linear RGB as such an eye sees it.
EYES = {
    "usual": np.eye(3).tolist(),
    "no red": [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]],
    "no green": [[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]],
    "no blue": [[1.2555, -0.0767, -0.1788], [-0.0784, 0.9309, 0.1476], [0.0047, 0.6914, 0.3039]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
WHITE = np.array([0.9505, 1.0, 1.089])


def cielab(colour, eye):
    """L*, a*, b* of "#rrggbb" (CIE 1976)."""
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    x, y, z = np.cbrt(XYZ @ np.clip(np.array(EYES[eye]) @ linear, 0.01, 1) / WHITE)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("eye", EYES)
def test_colours_are_told_apart_whatever_colours_one_sees(eye):
    seen = [cielab(colour, eye) for colour in plots.COLOURS]
    assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 20  # 2 is just visible
