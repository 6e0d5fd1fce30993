"""Constitutional AI: what is asked, who says what, soft labels by hand and against TRL, both losses."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
import yaml

from labkit import tinytown
from labkit.pairs import pack_pairs
from labkit.techniques import constitutional as cai
from labkit.techniques import dpo, reward

ROW = {"prompt": "What is two?"}


def echo(answers):
    """A `Respond` that keeps what it was asked, and answers with the next of `answers`."""
    asked, said = [], iter(answers)

    def respond(prompts):
        asked.append(prompts)
        return [next(said) for _ in prompts]

    return respond, asked


def one_section(**fields):
    principles = fields.pop("principles", [{"critic": "Be short.", "revision": "Shorten it."}])
    return cai.read({"any": {"principles": principles, **fields}})


def test_tinytowns_principles_are_those_that_its_texts_name():
    known = tinytown.texts("genres")
    forms = known["forms"]["critique"]
    for lang, section in cai.load().items():
        assert [p.critic for p in section.principles] == known["principles"][lang]
        slots = dict(q="Q", r="R", p="P", f="F", w="W", b="B")
        text = forms[lang][1].format(**slots)
        head = section.critique.format(prompt="Q", response="R", critic="P")
        assert text.startswith(head) and section.stop[0] in text
        head = section.alone.format(prompt="Q", response="R", critic="P")
        assert forms[lang][2].format(**slots).startswith(head)
        slots = dict(q="Q", a="1", b="2", v="A", o="B", f="F")
        judged = known["forms"]["judgement"][lang][0].format(**slots)
        asked = section.comparison.format(prompt="Q", a="1", b="2")
        assert judged.startswith(asked + section.letters[0])


def test_a_critique_sees_the_prompt_and_the_next_round_sees_the_revision():
    respond, asked = echo(["too long\n\nRevisionRequest: more", " Two. ", "fine", "2"])
    (chain,) = cai.revise([ROW], ["It is two, I think."], respond, one_section(), rounds=2)
    (critique,), (revision,), (again,), _ = asked
    assert "What is two?" in critique and "It is two, I think." in critique
    assert revision.endswith("too long\n\nRevisionRequest: Shorten it.\n\nRevision:")
    assert "Assistant: Two.\n" in again and "I think" not in again
    assert [step[1:] for step in chain] == [("too long", "Two."), ("fine", "2")]


def test_alone_asks_for_no_critique_and_an_empty_revision_changes_nothing():
    respond, asked = echo(["", "Two."])
    (chain,) = cai.revise([ROW], ["Well, two."], respond, one_section(), rounds=2, critique=False)
    assert len(asked) == 2 and "Critique" not in asked[0][0]
    assert [step.response for step in chain] == ["Well, two.", "Two."]


def test_principles_are_drawn_per_row_and_round_and_the_same_without_critiques():
    names, rows = "abc", [ROW] * 60
    sections = one_section(principles=[{"critic": n, "name": n} for n in names])

    def drawn(critique, seed=0):
        options = dict(rounds=2, critique=critique, seed=seed)
        chains = cai.revise(rows, ["x"] * 60, lambda p: ["y"] * len(p), sections, **options)
        return [[step.principle.name for step in chain] for chain in chains]

    assert drawn(True) == drawn(False) != drawn(True, seed=1)
    assert min(Counter(sum(drawn(True), [])).values()) > 20
    assert any(first != second for first, second in drawn(True))


def test_braces_in_what_is_written_are_left_alone():
    respond, asked = echo(["{critic}", "{0}"])
    (chain,) = cai.revise([{"prompt": "{x}"}], ["{y}"], respond, one_section(), rounds=1)
    assert "{x}" in asked[0][0] and "{y}" in asked[0][0] and chain[0].response == "{0}"


def test_a_judge_that_likes_the_first_place_says_nothing_after_both_orders():
    both = cai.compare([ROW] * 3, list("abc"), list("xyz"), lambda p, _: [0.9] * len(p), cai.load())
    assert both == pytest.approx(np.array([[0.9, 0.1]] * 3))
    assert cai.soft_labels(both) == pytest.approx([0.5] * 3)


def test_a_judge_by_content_says_the_same_in_both_orders():
    def longer(prompts, letters):
        found = []
        for prompt in prompts:
            a, b = prompt.split("\nA: ")[1].split("\nThe better")[0].split("\nB: ")
            found.append(float(len(a) > len(b)))
        return found

    rows = [ROW | {"lang": "en"}] * 2
    both = cai.compare(rows, ["long", "x"], ["a", "yyy"], longer, cai.load())
    assert both.tolist() == [[1, 1], [0, 0]]
    assert cai.soft_labels(both, (0.4, 0.6)).tolist() == [0.6, 0.4]


@pytest.mark.parametrize(
    "text, p",
    [("A", 1), ("(B)", 0), ("The answer is A.", 1), ("A or B", 0.5), ("", 0.5), ("Apple", 0.5)],
)
def test_letters_of_texts(text, p):
    assert cai.letters_of_texts(lambda prompts: [text])(["?"], [(" A", " B")]) == [p]


def test_letters_of_a_model_are_its_next_token_probabilities(tiny_model, tiny_tokenizer):
    model, prompts = tiny_model(), ["Which one?", "A longer question: which of both is it?"]
    found = cai.letters_of_model(model, tiny_tokenizer, template="bare")(prompts, [("A", "B")] * 2)
    for prompt, p in zip(prompts, found, strict=True):
        with torch.no_grad():
            logits = model(**tiny_tokenizer(prompt, return_tensors="pt")).logits[0, -1]
        a, b = (logits[tiny_tokenizer.encode(x)[0]].item() for x in "AB")
        assert p == pytest.approx(1 / (1 + math.exp(b - a)), abs=1e-5)
    with pytest.raises(ValueError, match="different first tokens"):
        cai.letters_of_model(model, tiny_tokenizer, template="bare")(["?"], [("A", "A")])


def test_numbers_by_hand():
    """z = log 3, so sigma(z) = 3/4: p = 3/4 gives the entropy, and no gradient."""
    z = torch.tensor([math.log(3)], requires_grad=True)
    value = cai.loss(z, torch.tensor([0.75]))
    assert value.item() == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert torch.autograd.grad(value, z)[0].item() == pytest.approx(0, abs=1e-6)
    assert cai.loss(z, torch.tensor([1.0])).item() == pytest.approx(math.log(4 / 3))


def soft(pairs, labels, seed=0):
    random = np.random.default_rng(seed)
    reference = random.normal(size=(len(pairs), 2)).astype(np.float32) - 20
    rows = zip(pairs, reference, labels, strict=True)
    return [dpo.Pair(p.chosen, p.rejected, known, label) for p, known, label in rows]


def test_labels_of_one_are_dpo_and_of_zero_dpo_the_other_way_round(tiny_model, make_pairs):
    pairs, config, model = make_pairs(), dpo.DPOConfig(beta=0.3), tiny_model()
    for label in (1.0, 0.0):
        some = soft(pairs, [label] * 5)
        batch = pack_pairs(some)
        turn = slice(None, None, 1 if label else -1)
        hard = pack_pairs([dpo.Pair(*s[:2][turn], s.reference[turn].copy()) for s in some])
        ours, theirs = cai.pair_loss(model, batch, config), dpo.pair_loss(model, hard, config)
        assert ours[0].item() == pytest.approx(theirs[0].item(), rel=1e-5)
        assert ours[1]["accuracy"] == theirs[1]["accuracy"]


def test_one_label_for_all_is_dpo_with_label_smoothing(tiny_model, make_pairs):
    pairs, model = make_pairs(), tiny_model()
    some = soft(pairs, [0.8] * 5)
    hard = pack_pairs([dpo.Pair(*s[:3]) for s in some])
    smooth = dpo.DPOConfig(beta=0.3, label_smoothing=0.2)
    ours = cai.pair_loss(model, pack_pairs(some), dpo.DPOConfig(beta=0.3))[0]
    assert ours.item() == pytest.approx(dpo.pair_loss(model, hard, smooth)[0].item(), rel=1e-5)


def rows_of(labels):
    pairs = [(f"{n}?", f"It is {n}.", "Bread.") for n in range(len(labels))]
    rows = [dict(zip(("prompt", "first", "second"), three, strict=True)) for three in pairs]
    return [row | {"label": label} for row, label in zip(rows, labels, strict=True)]


def test_the_policy_follows_the_labels_and_stops_at_what_is_not_sure(tiny_model, tiny_tokenizer):
    config = dpo.DPOConfig(max_steps=30, batch_size=8, learning_rate=3e-3)

    def margin(p):
        rows = rows_of([p] * 8)
        trained = cai.train(tiny_model(), tiny_tokenizer, rows, config, progress=False)
        return trained.history[-1]["margin"]

    unsure, wanted = margin(0.6), math.log(0.6 / 0.4)
    assert 0 < unsure < 2 * wanted < margin(0.98) and margin(0.02) < -1


def test_a_preference_model_learns_soft_labels(tiny_model, tiny_tokenizer):
    config = reward.RewardConfig(max_steps=40, batch_size=8, learning_rate=3e-3)
    rows = rows_of([0.75] * 8)
    model = cai.preference_model(tiny_model(), tiny_tokenizer, rows, config, progress=False)
    prompts = [row["prompt"] for row in rows]
    first, second = (model.scores(prompts, [r[s] for r in rows]) for s in ("first", "second"))
    assert np.mean(first) - np.mean(second) == pytest.approx(math.log(3), abs=0.5)


def test_pairs_that_teach_nothing_are_left_out(tiny_tokenizer, caplog):
    rows = rows_of([0.9, 0.2, 0.7, 0.6])
    rows[1] |= {"second": rows[1]["first"]}
    rows[2] |= {"first": "  "}
    assert [pair.label for pair in cai.encode(rows, tiny_tokenizer)] == [0.9, 0.6]
    assert "2 of 4 pairs left out" in caplog.text


def test_variants_that_have_no_soft_labels_are_refused(tiny_model, tiny_tokenizer):
    with pytest.raises(ValueError, match="variant"):
        cai.train(tiny_model(), tiny_tokenizer, rows_of([0.5]), dpo.DPOConfig(variant="ipo"))


def test_a_file_of_llm_swarm_loads_as_it_is(tmp_path):
    talk = [{"role": r, "content": c} for r, c in zip("uauaua", "123456", strict=True)]
    words = [{"critic": "Find harm.", "revision": "Remove it."}]
    file = tmp_path / "constitution_anthropic.json"
    file.write_text(json.dumps({"constitutions": words, "system_chat": [talk]}))
    (section,) = cai.load(file).values()
    asked = section.ask("critique", section.principles[0], prompt="Q", response="R")
    assert asked.startswith("Human: 1\n\nAssistant: 2\n\nCritiqueRequest: 3\n\nCritique: 4\n\n")
    assert asked.endswith("Human: Q\n\nAssistant: R\n\nCritiqueRequest: Find harm.\n\nCritique:")


def test_an_edited_copy_loads_and_what_is_none_is_refused(tmp_path):
    parts = yaml.safe_load(cai.FILE.read_text("utf-8"))
    file = tmp_path / "mine.yaml"
    parts["tinytown"]["en"]["principles"] = [{"critic": "Be brave."}]
    file.write_text(yaml.safe_dump(parts["tinytown"]))
    assert [p.critic for p in cai.load(file)["en"].principles] == ["Be brave."]
    assert len(cai.load("chapter")["any"].principles) == 3
    for bad in ("[]", "{principles: []}", "{principles: [{critic: 3}]}", "{colour: red}"):
        file.write_text(bad if bad == "[]" else f"en: {bad}")
        with pytest.raises(ValueError):
            cai.load(file)
    with pytest.raises(OSError):
        cai.load(tmp_path / "none.yaml")
