"""Votes on pairs: sides, winners, a file that is gone on with, raters who agree; and in a browser."""

import importlib.util
import json

import nbformat
import pytest

from labkit import data, judging, pairs, rating
from labkit.rating import Ballot

PROMPTS = [f"request {i}" for i in range(10)]
RESPONSES = {"dpo": [f"new {i}" for i in range(10)], "sft": [f"old {i}" for i in range(10)]}


def ballot(file, rater="", prompts=PROMPTS, responses=RESPONSES):
    return Ballot(prompts, responses, file, rater)


def favour(votes, model, n=10):
    """Votes for a model, wherever its response stands."""
    for _ in range(n):
        votes.vote("AB"[votes.pairs[votes.current]["models"].index(model)])


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_winner_is_named_whatever_its_side(tmp_path):
    votes = ballot(tmp_path / "votes.jsonl")
    favour(votes, "dpo")
    found = lines(votes.file)
    assert [vote["winner"] for vote in found] == ["dpo"] * 10 and votes.current == 10
    assert {vote["vote"] for vote in found} == {"A", "B"}  # the sides are mixed
    for vote in found:
        best = vote["responses"]["AB".index(vote["vote"])]
        assert best == f"new {vote['prompt'][-1]}"
    assert votes.verdicts() == [1.0] * 10
    swapped = ballot(votes.file, responses=dict(reversed(RESPONSES.items())))
    assert swapped.verdicts() == [0.0] * 10  # the same pairs, seen from the other model


def test_sides_are_drawn_for_each_pair_and_rater_and_stay():
    many = [f"prompt {i}" for i in range(400)]
    texts = {"x": ["a"] * 400, "y": ["b"] * 400}
    first = {
        rater: [pair["models"][0] for pair in Ballot(many, texts, "unused", rater).pairs]
        for rater in ("Ada", "Bob", "Ada ")
    }
    assert all(0.4 < sides.count("x") / 400 < 0.6 for sides in first.values())
    both = sum(x == y for x, y in zip(first["Ada"], first["Bob"], strict=True))
    assert 0.4 < both / 400 < 0.6
    assert first["Ada"] == [p["models"][0] for p in Ballot(many, texts, "unused", "Ada").pairs]


def test_ties_skips_undo_and_a_second_session(tmp_path):
    votes = ballot(tmp_path / "new" / "votes.jsonl", "Ada")
    votes.undo()  # nothing yet
    for choice in ("tie", "both bad", "skip", "A"):
        votes.vote(choice)
    votes.undo()
    assert votes.current == 3 and len(lines(votes.file)) == 3
    again = ballot(votes.file, "Ada")
    assert again.current == 3 and again.verdicts()[:4] == [0.5, 0.5, None, None]
    again.undo()
    favour(again, "sft", 8)
    assert again.verdicts() == [0.5, 0.5] + [0.0] * 8 and again.current == 10
    assert judging.rate(again.verdicts()).mean == 0.1
    for choice in ("A", "C"):
        with pytest.raises(ValueError, match="choice"):
            again.vote(choice)


def test_a_line_that_was_left_unfinished_is_voted_on_again(tmp_path):
    votes = ballot(tmp_path / "votes.jsonl")
    favour(votes, "dpo", 3)
    votes.file.write_bytes(votes.file.read_bytes()[:-9])
    again = ballot(votes.file)
    favour(again, "sft", 8)
    assert ballot(votes.file).verdicts() == [1.0] * 2 + [0.0] * 8 and len(lines(votes.file)) == 10


def test_two_raters_of_one_file_agree_or_not_and_one_alone_does_not(tmp_path):
    file = tmp_path / "votes.jsonl"
    ada, bob = ballot(file, "Ada"), ballot(file, "Bob")
    favour(ada, "dpo", 6), favour(ada, "sft", 4)
    with pytest.raises(ValueError, match="two raters"):
        rating.agreement(rating.read(file))
    favour(bob, "dpo", 4), bob.vote("tie"), favour(bob, "sft", 4)
    ((names, found),) = rating.agreement(rating.read(file)).items()
    # 9 pairs: Ada 6 dpo and 3 sft, Bob 4 dpo, 1 tie and 4 sft; they agree on 4 and 3.
    assert names == ("Ada", "Bob") and found.n == 9 and found.agreement == pytest.approx(7 / 9)
    assert found.chance == pytest.approx((6 * 4 + 3 * 4) / 81)
    bob.undo()
    assert len(lines(file)) == 18 and ballot(file, "Ada").current == 10
    other = ballot(tmp_path / "other.jsonl", "Cy", ["another"], {"dpo": ["x"], "sft": ["y"]})
    other.vote("A")
    with pytest.raises(ValueError, match="both have judged"):
        rating.agreement(rating.read(tmp_path / "other.jsonl", file))


def test_the_file_is_a_data_set_of_preferences(tmp_path, tiny_tokenizer):
    votes = ballot(tmp_path / "votes.jsonl")
    favour(votes, "dpo", 4), favour(votes, "sft", 4), votes.vote("tie"), votes.vote("both bad")
    rows = [row for s in ("train", "validation", "test") for row in data.load(votes.file, split=s)]
    assert {row["chosen"][:3] + row["prompt"][-1] for row in rows} == {
        *(f"new{i}" for i in range(4)),
        *(f"old{i}" for i in range(4, 8)),
    }
    assert all(row["chosen"][-1] == row["rejected"][-1] == row["prompt"][-1] for row in rows)
    assert len(pairs.encode_pairs(rows, tiny_tokenizer)) == 8
    votes.file.write_text(votes.file.read_text().replace('"new 0"', "null"))
    with pytest.raises(ValueError, match="two texts"):
        data.load(votes.file)


def test_bad_input_is_named(tmp_path):
    file = tmp_path / "votes.jsonl"
    for responses in ({"dpo": ["x"]}, {"a": ["x"], "b": []}, {"a": ["x"], "b": ["y"], "c": ["z"]}):
        with pytest.raises(ValueError, match="two models with 1"):
            ballot(file, prompts=["p"], responses=responses)
    with pytest.raises(ValueError, match="at least one"):
        ballot(file, prompts=[], responses={"a": [], "b": []})
    file.write_text('{"pair": 1}\n')
    with pytest.raises(ValueError, match="votes.jsonl: line 1: expected a vote"):
        ballot(file)


def test_a_vote_on_a_pair_that_is_no_longer_shown_does_not_count(tmp_path):
    pytest.importorskip("anywidget")
    view = rating.widget(ballot(tmp_path / "votes.jsonl", prompts=["<b>0</b>", *PROMPTS[1:]]))
    assert "dpo" not in str(view.get_state()["shown"])  # the names stay in the kernel
    for _ in range(2):  # a double click
        view._receive(view, {"number": 0, "choice": "tie"}, [])
    assert view.shown["number"] == 1 and "another pair" in view.shown["error"]
    view._receive(view, {"number": 1, "choice": "undo"}, [])
    assert view.shown["number"] == 0 and not view.shown["error"] and not lines(view.ballot.file)
    view.ballot.file = tmp_path  # a folder
    view._receive(view, {"number": 0, "choice": "tie"}, [])
    assert "Not saved" in view.shown["error"] and view.shown["number"] == 0


CELL = """
from labkit.rating import Ballot, widget
attack = "<script>document.title = 'owned'</script><img src=x onerror=\\"document.title='owned'\\">"
prompts = [f"Request {i}\\n{attack} $x^2$" for i in range(10)]
responses = {"dpo": [f"new {i} {attack}" for i in range(10)], "sft": [f"old {i}" for i in range(10)]}
widget(Ballot(prompts, responses, "votes.jsonl", "Ada"))
"""


@pytest.fixture
def lab(tmp_path, jupyterlab):
    """The address of a notebook with the widget in JupyterLab."""
    cells = [nbformat.v4.new_code_cell(CELL.strip())]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "rate.ipynb")
    return f"{jupyterlab(tmp_path)}/rate.ipynb?reset"


@pytest.mark.skipif(not importlib.util.find_spec("anywidget"), reason="needs anywidget")
def test_ten_votes_by_key_in_jupyterlab(browser, lab, tmp_path):
    from playwright.sync_api import expect

    file, wait = tmp_path / "votes.jsonl", {"timeout": 120_000}
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(120_000)
    box, errors = page.locator(".labkit-rating"), []
    page.on("pageerror", lambda error: errors.append(str(error)))

    def at(number):
        expect(box.locator("progress")).to_have_attribute("value", str(number), **wait)

    def run_all():
        page.goto(lab)
        page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        page.wait_for_selector("text=/Python 3.* . Idle/")  # else the lab asks which kernel
        page.click("text=Run >> nth=0")
        page.click("text=Run All Cells >> nth=0")
        at(5 if file.exists() else 0)

    def press(keys, number):
        box.click(position={"x": 5, "y": 5})
        for key in keys:
            page.keyboard.press(key)
            number += 1
            at(number)

    run_all()
    press("abtxs", 0)
    assert [vote["vote"] for vote in lines(file)] == ["A", "B", "tie", "both bad", "skip"]
    page.keyboard.press("Control+s")
    page.wait_for_selector(".jp-mod-dirty", state="detached")
    page.reload()
    at(5)  # the widget of the kernel that is still there
    assert page.locator(".jp-CodeCell").count() == 1  # "a" and "b" inserted no cell
    press("ab", 5)
    page.keyboard.press("u")
    at(6)
    page.keyboard.press("u")
    at(5)
    page.click("text=Kernel >> nth=0")
    page.click("text=Restart Kernel and Run All Cells")
    page.click(".jp-Dialog button:has-text('Restart')")
    expect(box).to_have_count(0, **wait)
    at(5)  # another session, which goes on
    texts = box.locator(".text").all_inner_texts()
    press("Babab", 5)
    expect(box).to_contain_text("All 10 pairs are rated")
    assert page.title() != "owned" and box.locator("script, img, .MathJax").count() == 0
    page.close()
    found = lines(file)
    assert len(found) == 10 and len({vote["pair"] for vote in found}) == 10
    assert {v["winner"] for v in found} <= {"dpo", "sft", None} and errors == []
    assert texts == [found[5]["prompt"], *found[5]["responses"]] and "<script>" in texts[0]
    for vote in found:
        right = {"A": vote["models"][0], "B": vote["models"][1]}.get(vote["vote"])
        assert vote["winner"] == right
        for text, model in zip(vote["responses"], vote["models"], strict=True):
            assert text.startswith({"dpo": "new", "sft": "old"}[model])
