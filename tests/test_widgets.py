"""The calculators' numbers against published ones."""

from base64 import b64encode

import ipywidgets
import pytest

from labkit import widgets


def test_llama_2_7b_of_the_chapter():
    cost = widgets.lora_cost(rank=8, width=4096, layers=32, targets="q, v")
    assert cost.trainable == 4_194_304 == 32 * 2 * 65_536
    assert cost.base + cost.trainable == 6_742_609_920
    assert round(100 * cost.share, 4) == 0.0622
    assert cost.file_bytes() == 16_777_216 and cost.file_bytes(2) == 8_388_608


def test_llama_2_13b_on_all_linear_layers():
    """40 layers of width 5,120 (inner 13,824, which is 2.7 widths): PEFT gives 62,586,880 at 16."""
    cost = widgets.lora_cost(rank=16, width=5120, layers=40, targets="all linear layers")
    assert cost.trainable == pytest.approx(62_586_880, rel=0.005)


def test_proportional_to_rank():
    small, large = (widgets.lora_cost(r, 512, 4, "q, k, v, o") for r in (3, 30))
    assert large.trainable == 10 * small.trainable and large.base == small.base


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"width": -1}, {"layers": 0}, {"targets": "qv"}])
def test_refusals(wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: expected"):
        widgets.lora_cost(**{"rank": 8, "width": 64, "layers": 2, "targets": "q, v", **wrong})


def shown(box):
    return "".join(
        str(output.get("text", output.get("data"))) for output in box.children[-1].outputs
    )


def test_sliders_move_the_table():
    calculator = widgets.lora_calculator(rank=8)
    names = [child.description for child in calculator.children[:-1]]
    assert names == ["rank", "width", "layers", "targets"]
    assert "4,194,304" in shown(calculator)
    calculator.children[0].value = 16
    assert "8,388,608" in shown(calculator) and "4,194,304" not in shown(calculator)


def test_exploring_shows_what_is_printed_and_returned_and_streams_nothing():
    slider = ipywidgets.IntSlider(value=2)

    def square(x):
        print("square of", x)
        return x * x

    box = widgets.explore(square, x=slider)
    assert "square of 2" in shown(box) and "'4'" in shown(box)
    slider.value = 3
    assert "square of 3" in shown(box) and "'9'" in shown(box) and "'4'" not in shown(box)
    assert box.children[-1].msg_id == ""  # the widget never catches a cell's own messages


def test_pictures_reach_the_browser_as_text():
    from IPython.display import Image, display

    png = b"\x89PNG\r\n\x1a\n" + bytes(8)
    data = {"image/png": png, "text/plain": "picture"}
    assert widgets._display(data, {})["data"] == {
        "image/png": b64encode(png).decode(), "text/plain": "picture",
    }  # fmt: skip
    widgets.explore(lambda x: display(Image(png)), x=ipywidgets.IntSlider())


def test_the_planner_follows_its_controls():
    box = widgets.memory_planner(technique="qlora", device_gb=24)
    controls = {control.description: control for control in box.children[:-1]}
    assert "image/png" in shown(box) and "it fits" in shown(box)
    controls["model"].value = dict(controls["model"].options)["LLaMA-65B"]
    assert "65.29 B" in shown(box) and "Nearest setting that fits" not in shown(box)
    assert "no setting known here makes it fit" in shown(box)
    controls["GB"].value = 48
    assert "it fits" in shown(box)
    controls["technique"].value = "prefix"  # with checkpointing still on
    assert "gradient_checkpointing: expected False" in shown(box)
    controls["checkpointing"].value = False
    assert "Nearest setting that fits: technique='qlora'" in shown(box)
