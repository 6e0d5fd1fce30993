"""The calculator's numbers against published ones; widgets show what their function shows."""

import ipywidgets
import pytest
from IPython.display import Image, display

from labkit import widgets


def number(text):
    return float(text.replace(",", "").split()[0])


def test_llama_2_7b_of_the_chapter():
    row = widgets.lora_row(rank=8, width=4096, layers=32, targets="q, v")
    assert number(row["trainable"]) == 4_194_304 == 32 * 2 * 65_536
    assert number(row["base parameters"]) + 4_194_304 == 6_742_609_920
    assert row["share"] == "0.0622%" and row["file, float32"] == "16.8 MB"


def test_llama_2_13b_on_all_linear_layers():
    """40 layers of width 5,120 (inner 13,824, which is 2.7 widths): PEFT gives 62,586,880 at 16."""
    row = widgets.lora_row(rank=16, width=5120, layers=40, targets="all linear layers")
    assert number(row["trainable"]) == pytest.approx(62_586_880, rel=0.005)


def shown(box):
    return "".join(
        str(output.get("text", output.get("data"))) for output in box.children[-1].outputs
    )


def test_sliders_move_the_table():
    calculator = widgets.lora_calculator(rank=8)
    assert "4,194,304" in shown(calculator)
    calculator.children[0].value = 16
    assert "8,388,608" in shown(calculator) and "4,194,304" not in shown(calculator)


def test_exploring_shows_what_is_printed_displayed_and_returned_and_streams_nothing():
    slider = ipywidgets.IntSlider(value=2)

    def square(x):
        print("square of", x)
        display(Image(b"\x89PNG\r\n\x1a\n" + bytes(8)))
        return x * x

    box = widgets.explore(square, x=slider)
    assert "square of 2" in shown(box) and "'4'" in shown(box)
    assert "iVBORw0KGgo" in shown(box)  # the picture as text
    slider.value = 3
    assert "square of 3" in shown(box) and "'9'" in shown(box) and "'4'" not in shown(box)
    assert box.children[-1].msg_id == ""  # the widget never catches a cell's own messages
