"""Votes on pairs: sides, winners, a file that is gone on with, raters who agree; and in a browser."""

import json

import pytest
from lab_page import Lab, write_notebook

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

    def first(rater):
        return [pair["models"][0] for pair in Ballot(many, texts, "unused", rater).pairs]

    ada, bob = first("Ada"), first("Bob")
    both = sum(x == y for x, y in zip(ada, bob, strict=True))
    assert all(0.4 < count / 400 < 0.6 for count in (ada.count("x"), bob.count("x"), both))
    assert ada == first("Ada") != first("Ada ")


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
    best = {row["chosen"][:3] + row["prompt"][-1] for row in rows}
    assert best == {f"{'new' if i < 4 else 'old'}{i}" for i in range(8)}
    assert all(row["chosen"][-1] == row["rejected"][-1] == row["prompt"][-1] for row in rows)
    assert len(pairs.encode_pairs(rows, tiny_tokenizer)) == 8
    votes.file.write_text(votes.file.read_text().replace('"new 0"', "null"))
    with pytest.raises(ValueError, match="two texts"):
        data.load(votes.file)


def test_bad_input_is_named(tmp_path):
    file = tmp_path / "votes.jsonl"
    for counts in ((1,), (1, 0), (1, 1, 1), (0, 0)):
        with pytest.raises(ValueError, match="two models with"):
            responses = {str(i): ["x"] * count for i, count in enumerate(counts)}
            ballot(file, prompts=["p"] * counts[0], responses=responses)
    file.write_text('{"pair": 1}\n')
    with pytest.raises(ValueError, match="votes.jsonl: line 1: expected a vote"):
        ballot(file)


def test_a_vote_on_a_pair_that_is_no_longer_shown_does_not_count(tmp_path):
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


def test_ten_votes_by_key_in_jupyterlab(browser, jupyterlab, tmp_path):
    from playwright.sync_api import expect

    write_notebook(tmp_path / "rate.ipynb", CELL.strip())
    lab = Lab(browser.new_page(), jupyterlab(tmp_path), tmp_path)
    file, page, wait = tmp_path / "votes.jsonl", lab.page, {"timeout": 120_000}
    box = page.locator(".labkit-rating")

    def at(number):
        expect(box.locator("progress")).to_have_attribute("value", str(number), **wait)

    def press(keys, number):
        box.click(position={"x": 5, "y": 5})
        for key in keys:
            page.keyboard.press(key)
            number += 1
            at(number)

    lab.open("rate")
    lab.run_all()
    at(0)
    press("abtxs", 0)
    assert [vote["vote"] for vote in lines(file)] == ["A", "B", "tie", "both bad", "skip"]
    lab.saved("rate")
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
    assert {v["winner"] for v in found} <= {"dpo", "sft", None} and not lab.errors
    assert texts == [found[5]["prompt"], *found[5]["responses"]] and "<script>" in texts[0]
    for vote in found:
        assert vote["winner"] == dict(zip("AB", vote["models"], strict=True)).get(vote["vote"])
        for text, model in zip(vote["responses"], vote["models"], strict=True):
            assert text.startswith({"dpo": "new", "sft": "old"}[model])
