"""The town and its text: deterministic, bilingual, complete, and never an instruction row."""

import hashlib
from itertools import islice

from labkit.tinytown import corpus, instruction_rows
from labkit.tinytown.world import PERSON_ATTRIBUTES, PLACE_ATTRIBUTES, World, texts, world

DOCUMENTS = list(islice(corpus.documents(0), 8000))


def test_a_seed_makes_one_town_and_the_text_that_the_base_checkpoint_was_pretrained_on():
    """Where the text changes on purpose: pretrain a new checkpoint, then put its digest here."""
    assert World(1).facts == World(1).facts != World(2).facts
    text = "\n".join(f"{genre}: {text}" for genre, text in DOCUMENTS)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "7b213ac3ee77bf66"


def test_the_town_is_complete_and_no_two_names_are_the_same():
    town = world()
    assert len(town.residents) == 72 and len(town.places) == 12
    expected = {(r.en, a) for r in town.residents for a in PERSON_ATTRIBUTES}
    assert set(town.facts) == expected | {(p.en, a) for p in town.places for a in PLACE_ATTRIBUTES}
    names = [n[x] for n in [*town.residents, *town.strangers] for x in ("en", "zh")]
    assert len(names) == len(set(names))


def test_every_fact_has_six_paraphrases_that_name_subject_and_value():
    for fact in world().facts.values():
        for lang in ("en", "zh"):
            statements = fact.statements(lang)
            assert len(set(statements)) >= 6
            for sentence in statements:
                assert fact.value[lang].lower() in sentence.lower()
                assert fact.subject[lang].lower() in sentence.lower()


def test_held_out_phrasings_are_not_those_of_the_corpus_or_of_tuning():
    for languages in texts("facts").values():
        for kinds in languages.values():
            assert not set(kinds["held"]) & set(kinds["ask"] + kinds["web"])


def test_halves_of_the_town_are_disjoint_and_friends_stay_in_their_half():
    town = world()
    tuning, held = ({p.en for p in half} for half in (town.tuning_people, town.heldout_people))
    assert not tuning & held and len(tuning | held) == len(town.residents)
    for person in town.tuning_people:
        assert town.fact(person, "friend").value.en in tuning


def test_every_genre_appears_in_both_languages():
    seen = {(genre, text.isascii()) for genre, text in DOCUMENTS}
    assert {genre for genre, _ in seen} == set(corpus.genre_samples(1))
    assert {genre for genre, ascii_only in seen if not ascii_only} == set(corpus.GENRES)


def test_no_document_has_an_instruction_row_or_a_chat_token():
    text = "\n".join(text for _, text in DOCUMENTS)
    assert "<|" not in text and "### Instruction" not in text
    for row in instruction_rows("train", 100):
        assert f"{row['prompt']}<|assistant|>{row['completion']}" not in text


def test_equations_are_true():
    lines = "\n".join(text for genre, text in DOCUMENTS if genre == "sums").split("\n")
    equations = [line.split(" = ") for line in lines if " = " in line]
    for left, right in equations:
        a, sign, b = left.split()
        assert int(right) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
    assert len(equations) > 100
