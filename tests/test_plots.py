"""Figures: labelled, small, and true to the numbers they were given."""

from statistics import stdev

import pytest

from labkit import plots

LABELS = dict(xlabel="rank", ylabel="accuracy", title="A sweep")


def test_every_figure_has_a_title_and_labelled_axes_and_is_small():
    figures = [
        plots.loss_curve([{"step": i, "loss": 3.0 - i / 10} for i in range(20)]),
        plots.lines({"a": ([1, 2], [3, 4])}, **LABELS),
        plots.sweep([1, 2], {"a": [[0.1, 0.2], [0.3]]}, **LABELS),
        plots.bars({"a": 1.0, "b": [1.0, 2.0]}, xlabel="method", ylabel="s", title="Bars"),
        plots.matrix([[1, 2]], xlabels="ab", ylabels="c", title="M", label="n", xlabel="x", ylabel="y"),
    ]  # fmt: skip
    for figure in figures:
        axes = figure.axes[0]
        assert axes.get_title() and axes.get_xlabel() and axes.get_ylabel()
        png = figure._repr_png_()
        assert png.startswith(b"\x89PNG") and len(png) < 60_000


def test_sweep_draws_mean_and_standard_deviation_of_the_seeds():
    figure = plots.sweep([1, 8], {"LoRA": [[0.2, 0.4], [0.5, 0.7]]}, **LABELS)
    ((line, _, (bars,)),) = figure.axes[0].containers
    assert list(line.get_ydata()) == pytest.approx([0.3, 0.6])
    low, high = bars.get_segments()[0][:, 1]
    assert (high - low) / 2 == pytest.approx(stdev([0.2, 0.4]))


def test_panels_have_one_colour_a_label_and_a_band_over_seeds():
    pictures = {"reward": {"a": ([1, 2], [[0.0, 2.0], [1.0, 3.0]]), "b": ([1], [5.0])},
                "KL (nats)": {"b": ([1, 2], [3.0, 4.0])}}  # fmt: skip
    figure = plots.panels(pictures, xlabel="step", title="Both")
    left, right = figure.axes
    assert [axes.get_ylabel() for axes in figure.axes] == list(pictures)
    assert all(axes.get_xlabel() == "step" for axes in figure.axes)
    assert list(left.lines[0].get_ydata()) == [1.0, 2.0] and len(left.collections) == 1
    low, high = left.collections[0].get_paths()[0].get_extents().intervaly
    assert (low, high) == pytest.approx((1 - 2**0.5, 2 + 2**0.5))
    assert left.lines[1].get_color() == right.lines[0].get_color() != left.lines[0].get_color()
    assert figure._suptitle.get_text() == "Both" and figure._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="2 x values and 1 y values"):
        plots.panels({"y": {"a": ([1, 2], [1.0])}}, xlabel="x", title="t")


def test_sweep_on_a_log_axis_names_the_values_tried():
    axes = plots.sweep([1, 4, 64], {"a": [[1], [2], [3]]}, logx=True, **LABELS).axes[0]
    assert axes.get_xscale() == "log"
    assert [t.get_text() for t in axes.get_xticklabels()] == ["1", "4", "64"]


def test_reference_lines_are_in_the_legend():
    axes = plots.sweep([1], {"a": [[1]]}, reference={"full": 0.9}, **LABELS).axes[0]
    assert {t.get_text() for t in axes.get_legend().get_texts()} == {"a", "full"}


def test_grouped_bars_keep_the_heights():
    values = {"base": {"en": 0.1, "zh": 0.2}, "tuned": {"en": 0.8, "zh": 0.7}}
    axes = plots.bars(values, ylabel="accuracy", title="t", percent=True).axes[0]
    heights = [patch.get_height() for patch in axes.patches]
    assert heights == [0.1, 0.2, 0.8, 0.7]
    assert axes.yaxis.get_major_formatter()(0.5, 0) == "50%"


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="series 'a' has 1 entries for 2 x values"):
        plots.sweep([1, 2], {"a": [[1]]}, **LABELS)
    with pytest.raises(ValueError, match="2 x values and 1 y values"):
        plots.lines({"a": ([1, 2], [1])}, **LABELS)
    with pytest.raises(ValueError, match="no row with 'loss'"):
        plots.loss_curve([{"step": 1}])
    with pytest.raises(ValueError, match="rows must be 1 × 2"):
        plots.matrix([[1]], xlabels="ab", ylabels="c", title="", label="")


def test_no_window_or_global_figure_is_left():
    import matplotlib.pyplot as plt

    plots.lines({"a": ([1, 2], [3, 4])}, **LABELS)
    assert plt.get_fignums() == []
