"""The calculator's numbers against published ones; what a notebook shows of a function or a mask."""

import ipywidgets
import nbformat
import pytest
from IPython.display import Image, display
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE, Unigram
from transformers import PreTrainedTokenizerFast

from labkit import notebooks, show, widgets

VIEW = "application/vnd.jupyter.widget-view+json"


def test_llama_2_7b_of_the_chapter_and_13b():
    row = widgets.lora_row(rank=8, width=4096, layers=32, targets="q, v")
    assert row["trainable"] == f"{32 * 2 * 65_536:,}" and row["share"] == "0.0622%"
    assert row["base parameters"] == f"{6_742_609_920 - 4_194_304:,}"
    # 40 layers of width 5,120 (inner 13,824, which is 2.7 widths): PEFT gives 62,586,880.
    row = widgets.lora_row(rank=16, width=5120, layers=40, targets="all linear layers")
    assert int(row["trainable"].replace(",", "")) == pytest.approx(62_586_880, rel=0.005)


def shown(box):
    return str([output.get("text", output.get("data")) for output in box.children[-1].outputs])


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
    assert all(part in shown(box) for part in ("square of 2", "'4'", "iVBORw0KGgo"))
    slider.value = 3
    assert "square of 3" in shown(box) and "'9'" in shown(box) and "'4'" not in shown(box)
    assert box.children[-1].msg_id == ""  # the widget never catches a cell's own messages


def test_a_widget_leaves_a_copy_for_readers_without_a_kernel(tmp_path, monkeypatch):
    kept, about = [], []

    def keep(data, raw, metadata=None):
        kept.append(data)
        about.append(metadata or {})

    monkeypatch.setattr(widgets, "display", keep)
    slider = ipywidgets.IntSlider(value=3, description="<n>")
    widgets.explore(lambda n: show.Table([{"square": n * n}]), n=slider)._ipython_display_()
    png = Image(b"\x89PNG\r\n\x1a\n" + bytes(8), width=640, alt="a curve")
    widgets.explore(lambda n: png, n=slider)._ipython_display_()
    assert 'width="640"' in kept[-1]["text/html"] and 'alt="a curve"' in kept[-1]["text/html"]
    both = zip(kept, about, strict=True)
    outputs = [nbformat.v4.new_output("display_data", data, metadata=m) for data, m in both]
    path = tmp_path / "a.ipynb"
    cell = nbformat.v4.new_code_cell("x", outputs=outputs)
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    notebooks.clean(path)
    found = nbformat.read(path, as_version=4).cells[0].outputs
    caption, table, again, picture = (output.data for output in found)
    assert found[-1].metadata["image/png"]["alt"] == "a curve" and not found[0].metadata
    assert VIEW in kept[0] and VIEW not in {**caption, **table, **again, **picture}
    assert "<p>&lt;n&gt; = 3" in caption["text/html"] and "<style" not in caption["text/html"]
    assert table["text/html"].startswith("<table") and ">9<" in table["text/html"]
    assert "iVBORw0KGgo" in picture["image/png"] and "text/html" not in picture  # for GitHub


TEXT = "What is 0  plus one? 河边é😀 It is one."
LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
LLAMA += [decoders.Strip(" ", 1, 0)]


@pytest.mark.parametrize("kind", ["Unigram", "BPE", "Llama"])
def test_masks_read_like_the_whole_text_where_a_space_belongs_to_the_next_word(kind):
    every_byte = [f"<0x{i:02X}>" for i in range(256)] * (kind == "Llama")
    options = {"special_tokens": ["<unk>", *every_byte], "vocab_size": 300, "show_progress": False}
    if kind == "Unigram":
        core, trainer = Unigram(), trainers.UnigramTrainer(unk_token="<unk>", **options)
    else:
        core, trainer = BPE(byte_fallback=kind == "Llama"), trainers.BpeTrainer(**options)
    core = Tokenizer(core)
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    if kind == "Llama":
        core.decoder = decoders.Sequence(LLAMA)
    core.train_from_iterator(["What is one? It is."] if kind == "Llama" else [TEXT] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    ids = tokenizer(TEXT)["input_ids"]
    every_third = [i % 3 == 0 for i in range(len(ids))]  # inside characters of several bytes too
    for mask in (every_third, [i > 9 for i in range(len(ids))]):
        view = show.show_masks([(ids, mask)], tokenizer)
        assert "".join(text for text, _ in view.examples[0]) == TEXT
    assert " is" in [text for text, _ in view.examples[0]] or kind == "Unigram"
