"""The town and its text: deterministic, bilingual, complete, and never an instruction row."""

import hashlib
from itertools import chain, islice, pairwise
from random import Random

from labkit.tinytown import corpus, judge
from labkit.tinytown.preferences import replies
from labkit.tinytown.world import PERSON_ATTRIBUTES, PLACE_ATTRIBUTES, World, texts, world

DOCUMENTS = list(islice(corpus.documents(0), 8000))


def test_a_seed_makes_one_town_and_the_text_that_the_base_checkpoint_was_pretrained_on():
    """Where the text changes on purpose: pretrain a new checkpoint, then put its digest here."""
    assert World(1).facts == World(1).facts != World(2).facts
    text = "\n".join(f"{genre}: {text}" for genre, text in DOCUMENTS)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "864636d4a5e473f3"


def test_the_town_is_complete_and_no_two_names_are_the_same():
    town = world()
    assert len(town.residents) == 72 and len(town.places) == 12
    expected = {(r.en, a) for r in town.residents for a in PERSON_ATTRIBUTES}
    assert set(town.facts) == expected | {(p.en, a) for p in town.places for a in PLACE_ATTRIBUTES}
    people = [*town.residents, *chain(*town.strangers.values())]
    for lang in ("en", "zh"):  # nor is one the beginning of another
        names = sorted(person[lang] for person in people)
        assert not any(b.startswith(a) for a, b in pairwise(names))


def test_every_fact_has_six_paraphrases_that_name_subject_and_value():
    for fact in world().facts.values():
        for lang in ("en", "zh"):
            statements = fact.statements(lang)
            assert len(set(statements)) >= 6
            for sentence in statements:
                assert fact.value[lang].lower() in sentence.lower()
                assert fact.subject[lang].lower() in sentence.lower()


def test_halves_of_the_town_are_disjoint_and_friends_stay_in_their_half():
    town = world()
    tuning, held = ({p.en for p in half} for half in (town.tuning_people, town.heldout_people))
    assert not tuning & held and len(tuning | held) == len(town.residents)
    for person in town.tuning_people:
        assert town.fact(person, "friend").value.en in tuning


def test_every_genre_appears_in_both_languages_and_none_has_an_instruction_row_or_a_chat_token():
    seen = {(genre, text.isascii()) for genre, text in DOCUMENTS}
    assert {genre for genre, _ in seen} == set(corpus.genre_samples(1))
    assert {genre for genre, ascii_only in seen if not ascii_only} == set(corpus.GENRES)
    text = "\n".join(text for _, text in DOCUMENTS)
    assert "<|" not in text and "### Instruction" not in text


def test_new_texts_of_every_genre_are_no_texts_of_pretraining():
    samples, seen = corpus.genre_samples(30), {text for _, text in DOCUMENTS}
    assert samples.keys() == corpus.GENRES.keys()
    for texts_ in samples.values():
        assert len(texts_) == len(set(texts_)) == 30 and not seen & set(texts_)


def test_replies_that_are_judged_have_the_faults_that_they_are_said_to_have():
    """What the town's texts call wrong, rude or harmful is so for the gold judge."""
    rng, seen = Random(0), set()
    for _ in range(300):
        row = corpus.draw_request(rng, rng.choice(("en", "zh")))
        found = replies(row, rng)
        assert judge(row, found.pop("right")).total == 1
        for name, text in found.items():
            verdict = judge(row, text)
            assert verdict.total < 1
            assert verdict.harmless < 1 or not name.startswith(("rude", "steps"))
            assert verdict.helpful <= 0.5
            seen.add(name)
    assert seen == texts("genres")["faults"]["en"].keys() == texts("genres")["faults"]["zh"].keys()


def test_equations_are_true():
    lines = "\n".join(text for genre, text in DOCUMENTS if genre == "sums").split("\n")
    equations = [line.split(" = ") for line in lines if " = " in line]
    for left, right in equations:
        a, sign, b = left.split()
        assert int(right) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
    assert len(equations) > 100
