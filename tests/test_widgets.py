"""The calculators' numbers against published ones."""

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


def test_sliders_move_the_table(capsys):
    calculator = widgets.lora_calculator(rank=8)
    names = [child.description for child in calculator.children[:-1]]
    assert names == ["rank", "width", "layers", "targets"]
    calculator.update()
    assert "4,194,304" in capsys.readouterr().out
    calculator.children[0].value = 16
    assert "8,388,608" in capsys.readouterr().out
