"""The town and its text: deterministic, bilingual, complete, and never an instruction row."""

from itertools import islice

from labkit.tinytown import corpus, instruction_rows
from labkit.tinytown.world import PERSON_ATTRIBUTES, PLACE_ATTRIBUTES, World, texts, world


def test_the_same_seed_gives_the_same_town_and_text():
    assert World().facts == World().facts
    assert World(1).facts != World(2).facts
    first, again, other = (list(islice(corpus.documents(s), 300)) for s in (0, 0, 3))
    assert first == again != other


def test_the_town_is_as_large_as_promised():
    town = world()
    assert len(town.residents) >= 64 and len(town.places) == 12
    for person in town.residents:
        assert all((person.en, a) in town.facts for a in PERSON_ATTRIBUTES)
    for place in town.places:
        assert all((place.en, a) in town.facts for a in PLACE_ATTRIBUTES)
    names = [n[x] for n in [*town.residents, *town.strangers] for x in ("en", "zh")]
    assert len(names) == len(set(names))
    assert all(" " not in r.en for r in town.residents)


def test_every_fact_has_six_paraphrases_that_name_subject_and_value():
    for fact in world().facts.values():
        for lang in ("en", "zh"):
            said = fact.statements(lang)
            assert len(set(said)) >= 6
            for sentence in said:
                assert fact.value[lang].lower() in sentence.lower()
                assert fact.subject[lang].lower() in sentence.lower()


def test_held_out_phrasings_are_no_phrasings_of_the_corpus_or_of_tuning():
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
    seen = {(g, t.isascii()) for g, t in islice(corpus.documents(0), 8000)}
    assert {g for g, _ in seen} == set(corpus.GENRES)
    assert {g for g, ascii_only in seen if not ascii_only} == set(corpus.GENRES)


def test_no_document_holds_an_instruction_row_or_a_chat_token():
    text = "\n".join(t for _, t in islice(corpus.documents(0), 6000))
    assert "<|" not in text and "### Instruction" not in text
    for row in instruction_rows("train", 100):
        assert f"{row['prompt']}<|assistant|>{row['completion']}" not in text


def test_equations_are_true():
    for _, text in islice(((g, t) for g, t in corpus.documents(5) if g == "sums"), 100):
        for line in text.split("\n"):
            if " = " in line:
                left, right = line.split(" = ")
                a, sign, b = left.split()
                assert int(right) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
