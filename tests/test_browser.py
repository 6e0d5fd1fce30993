"""In JupyterLab, in headless Chromium: notebooks read, run with few steps, widgets moved, and stopped.

Every notebook is opened; the run of all of them takes minutes, so by default one is run here (nbval
executes them all), and all with LABKIT_BROWSER=1. Screenshots are kept in build/screens.
"""

import os
import re
import shutil

import nbformat
import pytest
from lab_page import RED, Lab, write_notebook

from labkit import cli, notebooks

NAMES = [notebook.name for notebook in notebooks.available()]
RUN = NAMES if os.environ.get("LABKIT_BROWSER") else ["02_lora"]
STOPPED = """
from labkit import data, models, tinytown
from labkit.training import TrainConfig, fit, sft_loss

begun = []
# cell
model, tokenizer = models.load("tinytown", device="cpu")
rows = data.encode(tinytown.instruction_rows("train", 400), tokenizer)
result = fit(model, rows, sft_loss, TrainConfig(max_steps=4000, batch_size=4))
begun.append(result.history[0]["loss"])
# cell
print(len(begun), "begun at the same loss:", len(set(begun)) == 1)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory, browser, jupyterlab):
    """A folder with copies of the notebooks, each with the parameters of the profile quick."""
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(notebooks.folder() / "images", folder / "images")
    for each in notebooks.available():
        shutil.copy(each.path, folder)
        book = load_notebook_node(str(each.path))
        book.metadata.kernelspec["language"] = "python"
        book = parameterize_notebook(book, cli._profile("quick", each.path))
        nbformat.write(book, folder / f"quick_{each.name}.ipynb")
    write_notebook(folder / "stop.ipynb", *STOPPED.strip().split("\n# cell\n"))
    write_notebook(folder / "fails.ipynb", "1 / 0", "2")
    return folder, jupyterlab(folder, LABKIT_RUNS=str(folder), WANDB_MODE="disabled")


@pytest.fixture
def lab(browser, place):
    folder, address = place
    context = browser.new_context(viewport={"width": 1300, "height": 1000})
    yield (opened := Lab(context.new_page(), address, folder))
    context.close()
    assert not opened.errors


@pytest.mark.parametrize("name", NAMES)
def test_every_notebook_reads_well_before_it_is_run(lab, name):
    lab.open(name)
    page, book = lab.page, nbformat.read(lab.folder / f"{name}.ipynb", as_version=4)
    page.wait_for_function(f"document.querySelectorAll('.jp-Cell').length == {len(book.cells)}")
    pictures = page.locator(".jp-Notebook img")
    loaded = "[...document.querySelectorAll('.jp-Notebook img')].every(i => i.naturalWidth > 0)"
    page.wait_for_function(loaded)
    assert pictures.count() >= str(book).count("image/png': 'iVBOR")
    text = page.locator(".jp-Notebook").inner_text()
    assert "Error displaying widget" not in text and "model not found" not in text
    assert page.locator(RED).count() == 0
    lab.screen(name)


@pytest.mark.parametrize("name", RUN)
def test_run_all_and_move_every_widget(lab, name):
    lab.open(f"quick_{name}")
    lab.run_all()
    lab.ran()
    code = [cell for cell in lab.saved(f"quick_{name}").cells if cell.cell_type == "code"]
    failed = [o for cell in code for o in cell.outputs if o.output_type == "error"]
    assert not failed and all(cell.execution_count for cell in code if cell.source.strip())
    boxes = lab.page.locator(".widget-vbox[class*=labkit-]")
    moved = 0
    for box in boxes.all():
        box.scroll_into_view_if_needed()
        shown = box.locator(".widget-output")
        before = shown.inner_html()
        for handle in box.locator(".noUi-handle").all():
            handle.focus()
            lab.page.keyboard.press("ArrowRight")
        for choice in box.locator("select").all():
            choice.select_option(index=choice.locator("option").count() - 1)
        for field in box.locator(".widget-text input, .widget-combobox input").all():
            field.fill("Where is the mill?")
            field.press("Enter")
        lab.finish()
        assert shown.locator(RED).count() == 0
        moved += shown.inner_html() != before
    assert moved == boxes.count()
    lab.screen(f"{name}_widgets")
    lab.shut_down()


def test_a_failing_cell_is_seen(lab):
    lab.open("fails")
    lab.run_all()
    lab.ran(60)
    assert "ZeroDivisionError" in lab.page.locator(RED).inner_text()
    lab.shut_down()


def test_a_training_is_stopped_and_begins_again(lab):
    def run_cell(number):
        page.locator(".jp-CodeCell").nth(number).locator(".jp-InputArea-prompt").click()
        page.keyboard.press("Control+Enter")

    lab.open("stop")
    page, stopped = lab.page, re.compile(r"stopped at step \d+ of 4000: the model keeps")
    lab.run_all()
    page.locator("progress").wait_for()
    lab.screen("training")
    page.get_by_role("button", name="Stop", exact=True).click()
    page.get_by_text(stopped).first.wait_for()
    lab.finish()
    run_cell(1)
    page.locator("progress").wait_for()
    page.keyboard.press("i")
    page.keyboard.press("i")
    page.get_by_text(stopped).first.wait_for()
    lab.finish()
    run_cell(2)
    page.get_by_text("2 begun at the same loss: True").wait_for()
    outputs = [o for cell in lab.saved("stop").cells for o in cell.outputs]
    assert all(output.output_type != "error" for output in outputs)
    lab.shut_down()
