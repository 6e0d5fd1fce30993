"""Data: what loads, how it is converted, where loss falls, and what bad input says."""

import csv
import gzip
import json
import lzma
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import trl
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit import data, formats, show, templates

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
SEEDS = SHARED / "self_instruct_seed_tasks.jsonl"
TRANSCRIPTS = SHARED / "hh_harmless_base_test.jsonl.gz"
ALPACA_ROW = {"instruction": "Give an antonym.", "input": "hot", "output": "cold"}
SPLITS = ("train", "validation", "test")
PAIR = {"prompt": "What is three plus four?", "completion": "Seven."}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)


def needs(path):
    return pytest.mark.skipif(not path.exists(), reason=f"{path.name} is not beside the project")


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return str(path)


def says(text, role="assistant"):
    return [{"role": role, "content": text}]


def ask(text):
    return says(text, "user")


def converted(*rows):
    return formats.convert(rows, "mine")


def every_part(path):
    return [row for split in SPLITS for row in data.load(str(path), split=split)]


@needs(SEEDS)
def test_seed_tasks_load_and_encode_as_they_are(tiny_tokenizer):
    rows = every_part(SEEDS)
    assert len(rows) == len({row["id"] for row in rows}) == 175  # the parts do not overlap
    raw = {task["id"]: task for task in map(json.loads, SEEDS.read_text("utf-8").splitlines())}
    for row in rows:
        instance = raw[row["id"]]["instances"][0]
        assert row["completion"] == instance["output"] and instance["input"] in row["prompt"]
        assert row["prompt"].startswith(raw[row["id"]]["instruction"])
    encoded = data.encode(rows[:20], tiny_tokenizer, max_length=128)
    assert len(encoded) == 20 and max(len(example.ids) for example in encoded) == 128


@needs(TRANSCRIPTS)
def test_transcripts_load_as_they_are():
    rows = every_part(TRANSCRIPTS)
    assert len(rows) == 2312
    for row in rows:
        assert row["prompt"][0]["role"] == row["prompt"][-1]["role"] == "user"
        assert [m["role"] for m in row["chosen"] + row["rejected"]] == ["assistant"] * 2
        assert row["chosen"] != row["rejected"]


def test_the_same_rows_from_every_file_type(tmp_path):
    rows = [{"prompt": f'say "{i}",\nplease, 米拉', "completion": f"{i}\u2028."} for i in range(40)]
    for name in ("a.jsonl", "a.ndjson", "lines.json"):
        write(tmp_path / name, rows)
    for name, content in {"a": rows, "data": {"data": rows}, "train": {"train": rows}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content), "utf-8")
    for suffix, opened in (("gz", gzip.open), ("xz", lzma.open)):
        with opened(tmp_path / f"a.jsonl.{suffix}", "wt", encoding="utf-8") as file:
            file.write((tmp_path / "a.jsonl").read_text("utf-8"))
    for suffix, delimiter in (("csv", ","), ("tsv", "\t")):
        with open(tmp_path / f"a.{suffix}", "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    import datasets

    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    loaded = {path.name: data.load(str(path)) for path in tmp_path.iterdir()}
    assert len(loaded) == 11
    for name, got in loaded.items():
        assert len(got) == 36 and got == loaded["a.jsonl"], name
        assert all(row in rows for row in got)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=80))
def test_parts_of_a_file_are_disjoint_and_complete(tmp_path_factory, numbers):
    """A row that occurs twice, and both instances of a task, are in one part."""
    instances = [{"output": "x"}, {"output": "y"}]
    rows = [{"instruction": f"{i}", "instances": instances} for i in numbers]
    path = write(tmp_path_factory.mktemp("equal") / "a.jsonl", rows)
    splits, different = SPLITS if len(set(numbers)) > 2 else SPLITS[:1], len(set(numbers))
    parts = [data.load(path, split=split, seed=seed) for seed, split in enumerate(splits)]
    assert sorted(row["prompt"] for part in parts for row in part) == sorted(map(str, numbers * 2))
    sizes = [len({row["prompt"] for row in part}) for part in parts]
    assert sum(sizes) == different and sizes[1:] == [max(1, round(different / 20))] * len(sizes[1:])


def test_limit_samples_by_seed_and_all_of_a_file_is_every_row_in_its_order(tmp_path):
    rows = [{"text": f"row {i}"} for i in range(100)]
    path = write(tmp_path / "a.jsonl", rows)
    assert data.load(path, split="all") == rows
    assert len(data.load(path, limit=7)) == 7
    assert data.load(path, limit=7, seed=1) == data.load(path, limit=7, seed=1)
    assert data.load(path, limit=7, seed=1) != data.load(path, limit=7, seed=2)
    assert data.load(path, limit=1000) == data.load(path)


def test_errors_name_the_row_of_the_file(tmp_path, make_tokenizer):
    """Cutting, shuffling and sampling do not change what a row is called."""
    rows = [{"messages": ask("q") + says("a") + ask(f"{i}") + says("b")} for i in range(60)]
    rows[41] = {"messages": says("s", "system") + ask("q") + says("a")}
    path = write(tmp_path / "a.jsonl", rows)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = LLAMA2
    for options in ({}, {"limit": 53, "seed": 1}):
        loaded = data.load(path, **options)
        assert rows[41] in loaded
        with pytest.raises(ValueError, match=r"a\.jsonl, row 42: template: .*not supported"):
            data.encode(loaded, tokenizer)


BAD_FILES = {
    "empty file": ("a.jsonl", b"", ""),
    "malformed line": ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', ".*line 3.*take it out"),
    "malformed json": ("a.json", b'[{"text": "a"},\n{"text": }]', ".*line 2"),
    "several splits": ("a.json", b'{"train": [{"text": "a"}], "test": [{"text": "b"}]}', ".*test"),
    "deep json": ("a.json", b"[" * 200_000, ""),
    "long number": ("a.jsonl", b'{"text": "a", "n": ' + b"9" * 6000 + b"}", ".*line 1"),
    "not UTF-8": ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', ""),
    "cut gzip": ("a.jsonl.gz", gzip.compress(b'{"text": "a"}' * 9)[:-9], ""),
    "bad xz": ("a.jsonl.xz", b"\xfd7zXZ\x00rubbish", ""),
    "short csv row": ("a.csv", b"prompt,completion\na,b\nc\n", ".*line 3"),
    "one name twice": ("a.csv", b"prompt,prompt,completion\na,b,c\n", ".*prompt"),
    "unknown suffix": ("a.txt", b"hello", ""),
    "no parquet": ("a.parquet", b"hello", ""),
    "missing column": ("a.jsonl", b'{"text": "b"}\n{"prompt": "a"}\n', ", row 2.*text"),
    "unknown columns": ("a.jsonl", b'{"foo": 1, "bar": 2}\n', ", row 1.*foo"),
}


@pytest.mark.parametrize("name, content, place", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file_is_named(tmp_path, name, content, place):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"data: .*{name}{place}"):
        data.load(str(tmp_path / name))


def test_bad_names(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data: .*mine\.jsonl"):
        data.load("mine.jsonl")
    for name, message in ((tmp_path, str(tmp_path)), ("tinytwon", "'tinytown'"), ("", "data")):
        with pytest.raises(ValueError, match=message):
            data.load(str(name))


def test_bad_splits_limits_and_sets(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}])
    for split in ("dev", "test"):  # of two rows, none can be held out
        with pytest.raises(ValueError, match="split"):
            data.load(path, split=split)
    with pytest.raises(ValueError, match="limit"):
        data.load(path, limit=0)
    with pytest.raises(ConnectionError, match="someone/something"):
        data.load("someone/something")


def fake_hub(monkeypatch, sets):
    import datasets

    made = {name: datasets.Dataset.from_list(rows) for name, rows in sets.items()}
    calls = []

    def load_dataset(path, name, **options):
        calls.append((path, name, options["revision"]))
        return datasets.DatasetDict(made)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_hub_set_uses_its_own_parts_and_cuts_the_missing(monkeypatch):
    rows = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(40)]
    calls = fake_hub(monkeypatch, {"train": rows, "test": [{"question": "qt", "answer": "at"}]})
    assert data.load("some/set:part", split="test") == [{"prompt": "qt", "completion": "at"}]
    train = data.load("some/set", revision="v2")
    held = data.load("some/set", split="validation")
    assert calls[:2] == [("some/set", "part", None), ("some/set", None, "v2")]
    assert len(train) == 38 and len(held) == 2
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held}
    with pytest.raises(ValueError, match="split.*dev"):
        data.load("some/set", split="dev")


def test_registered_set_leaves_broken_rows_out_and_says_so(monkeypatch, caplog):
    rows = [dict(ALPACA_ROW) for _ in range(30)] + [{**ALPACA_ROW, "output": ""}] * 30
    calls = fake_hub(monkeypatch, {"train": rows})
    with caplog.at_level("WARNING", logger="labkit"):
        loaded = data.load("alpaca")
    assert 0 < len(loaded) < 31 and "alpaca" in caplog.text
    assert calls == [("tatsu-lab/alpaca", None, None)]


def test_instructions_keep_their_parts():
    row, bare = converted(ALPACA_ROW, {"instruction": "Say hi.", "output": "Hi"})
    kept = {key: ALPACA_ROW[key] for key in ("instruction", "input")}
    assert row == {"prompt": "Give an antonym.\n\nhot", "completion": "cold"} | kept
    assert bare["prompt"] == "Say hi."
    for question, answer in (("instruction", "response"), ("question", "answer")):
        dolly = {question: "Give an antonym.", "context": "hot", answer: "cold"}
        assert converted(dolly) == [{**row, "context": "hot"}]


PAIR_NAMES = """prompt completion, prompt response, question answer, query response, inputs targets,
inputs_pretokenized targets_pretokenized, question std_answer, input output, user assistant"""


@pytest.mark.parametrize("names", PAIR_NAMES.split(","))
def test_pairs_under_any_name(names):
    question, answer = names.split()
    pair = {"prompt": "q", "completion": "a"}
    assert converted({question: "q", answer: "a", "id": 7}) == [{**pair, "id": 7}]
    pair = {"prompt": ask("q"), "completion": says("a")}
    assert converted({question: ask("q"), answer: "a"}) == [pair]
    assert converted({question: "q", answer: says("a")}) == [pair]


def test_prompts_alone_have_no_answer_to_learn(tiny_tokenizer):
    rows = converted({"prompt": "q", "id": 7}) + converted({"prompt": ask("q")})
    assert rows == [{"prompt": "q", "id": 7}, {"prompt": ask("q")}]
    with pytest.raises(ValueError, match="completion"):
        data.encode(rows, tiny_tokenizer)
    with pytest.raises(ValueError, match="empty"):
        converted({"prompt": " "})


def test_conversations_of_any_names_agree():
    turns = [("human", "Hi"), ("gpt", "Hello"), ("human", "Bye"), ("gpt", "Good bye")]
    roles = {"human": "user", "gpt": "assistant"}
    expected = [{"role": roles[f], "content": v} for f, v in turns]
    parts = [{"role": f.upper(), "content": [{"type": "text", "text": v}]} for f, v in turns]
    filled = [{"role": None, "from": f, "content": None, "value": v} for f, v in turns]
    arrow = {"role": [roles[f] for f, _ in turns], "content": [v for _, v in turns]}
    longer = expected + ask("more") + [{**says("unlearned")[0], "weight": 0}]
    for messages in (expected, parts, filled, arrow, longer):
        (row,) = converted({"messages": messages, "text": None, "tools": []})
        assert row["messages"] == expected
        assert converted({"conversations": messages}) == [{"messages": expected}]
    coig = [{"question": q, "answer": a} for (_, q), (_, a) in (turns[:2], turns[2:])]
    for conversation in (coig, expected):
        (row,) = converted({"instruction": "Greet.", "conversations": conversation})
        assert row["messages"] == ask("Greet.\n\nHi") + expected[1:]


def test_transcripts_share_the_prompt():
    begin = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: A\n\nHuman: B\n\nAssistant:"
    (row,) = converted({"chosen": begin + " good", "rejected": begin})
    assert [m["content"] for m in row["prompt"]] == ["Hi", "Hello", "A\n\nB"]
    assert (row["chosen"], row["rejected"]) == (says("good"), says(""))


def test_preferences_of_every_mixture():
    """Texts stay texts; whatever holds messages becomes the same three lists of messages."""
    user, texts = ask("q"), {"chosen": "a", "rejected": "b"}
    for question in ("prompt", "question", "instruction"):
        (row,) = converted({question: "q", **texts, "messages": user})
        assert {name: row[name] for name in ("prompt", *texts)} == {"prompt": "q", **texts}
    replies = {name: says(text) for name, text in texts.items()}
    whole = {name: user + reply for name, reply in replies.items()}
    single = {name: {"from": "gpt", "value": text} for name, text in texts.items()}
    for raw in (
        {"prompt": "q", **replies},
        {"prompt": user, **texts},
        {"prompt": user, **replies},
        {"prompt": "q", **whole},
        {"prompt": user, **whole},
        {"prompt": None, **whole},
        {"conversations": [{"from": "human", "value": "q"}], **single},
    ):
        assert converted(raw) == [{"prompt": user, **replies}], raw
    (row,) = converted({**ALPACA_ROW, **texts})
    assert row["prompt"] == "Give an antonym.\n\nhot" and row["chosen"] == "a"
    assert templates.response(row) == "cold"


def test_a_system_column_becomes_a_message(tiny_tokenizer):
    conversation = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    expected = ("<|system|>s<|end|><|user|>q<|end|><|assistant|>", "a<|end|>")
    pairs = {"prompt": "q", "completion": "a"}, {"instruction": "q", "output": "a"}
    twice = {"messages": says("s", "system") + conversation}
    for raw in (*pairs, {"conversations": conversation}, twice):
        (row,) = converted({**raw, "system": "s"})
        assert data.render(row, tiny_tokenizer) == expected
        with pytest.raises(ValueError, match="alpaca"):
            data.render(row, tiny_tokenizer, "alpaca")


BAD_ROWS = {
    "empty answer": ({"prompt": "a", "completion": " "}, "completion"),
    "wrong type": ({"prompt": "a", "completion": 7}, "completion"),
    "half a character": ({"text": "\ud83d"}, "text"),
    "few ranks": ({"prompt": "q", "responses": ["a", "b"], "ranks": [1]}, "ranks"),
    "tie": ({"prompt": "q", "responses": ["a", "b"], "ranks": [1, 1]}, "ranks"),
    "role": ({"messages": [{"role": "alien", "content": "x"}]}, "messages.*alien"),
    "uneven": ({"messages": {"role": ["user", "gpt"], "content": ["x"]}}, "messages"),
    "no answer": ({"messages": ask("x")}, "messages"),
    "no instances": ({"instruction": "x", "instances": []}, "instances"),
    "coig": ({"instruction": "", "conversations": [{"question": "x"}]}, "answer"),
    "equal": (dict.fromkeys(("chosen", "rejected"), "\n\nHuman: a\n\nAssistant: b"), "rejected"),
    "image": ({"messages": says([{"type": "image"}], "user")}, "text"),
    "bad answer": ({"prompt": "a", "completion": "b", "label": False}, "label"),
    "tools": ({"messages": says("a"), "tools": [{"name": "f"}]}, "tools"),
    "thoughts": ({"messages": [{**says("a")[0], "reasoning_content": "h"}]}, "reasoning_content"),
    "history": ({**ALPACA_ROW, "history": [["a", "b"]]}, "history"),
    "system": ({"text": "a", "system": "b"}, "system"),
    "facts": ({"question": "a", "context": {"b": "c"}, "answer": "d"}, "context"),
}


@pytest.mark.parametrize("row, column", BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_row_is_named(row, column):
    with pytest.raises(ValueError, match=f"data: mine, row 1: .*{column}"):
        converted(row)


def test_alpaca_templates(make_tokenizer):
    tokenizer = make_tokenizer(chat=False)
    row, bare = converted(ALPACA_ROW, {"instruction": "Say hi.", "output": "Hi"})
    prompt, completion = data.render(row, tokenizer)
    assert prompt == (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nGive an antonym.\n\n### Input:\nhot\n\n### Response:\n"
    )
    assert completion == "cold<|end|>"
    assert "### Input" not in data.render(bare, tokenizer)[0]
    chinese = data.render(row, tokenizer, "alpaca_zh")[0]
    assert chinese.endswith("### 指令：\nGive an antonym.\n\n### 输入：\nhot\n\n### 回复：\n")
    assert "### 输入" not in data.render(PAIR, tokenizer, "alpaca_zh")[0]
    for prompt, space in (("Q: Hot?\nA:", " "), ("答：", ""), ("", "")):
        row = {"prompt": prompt, "completion": "No."}
        assert data.render(row, tokenizer, "bare") == (prompt, f"{space}No.<|end|>")
    braces = {"prompt": "{input} {0}", "completion": "x"}
    assert "{input} {0}" in data.render(braces, tokenizer, "alpaca")[0]


ASK = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
THINK = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and '<think>' not in "
    "m.content %}<think></think>{% endif %}{{ m.content }}{{ eos_token }}{% endfor %}" + ASK
)
BARE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}[/]\n{% endfor %}" + ASK
FRAMES = {
    "chatml": (CHATML, "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "a<|im_end|>"),
    "llama2": (LLAMA2, "[INST] q [/INST]", " a <|end|>"),
    "no EOS": (BARE, "<|user|>q[/]\n<|assistant|>", "a[/]<|end|>"),
    "thoughts": (THINK, "<|user|>q<|end|><|assistant|><think></think>", "a<|end|>"),
}


@pytest.mark.parametrize("template, prompt, completion", FRAMES.values(), ids=FRAMES)
def test_prompt_and_completion_are_the_templates_own(tiny_tokenizer, template, prompt, completion):
    tiny_tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tiny_tokenizer.chat_template = template
    assert data.render({"prompt": "q", "completion": "a"}, tiny_tokenizer) == (prompt, completion)
    assert data.render({"prompt": "q", "completion": ""}, tiny_tokenizer)[0] == prompt
    own = tiny_tokenizer.apply_chat_template(ask("q") + says("a"), tokenize=False)
    assert own.rstrip() == (prompt + completion).removesuffix("<|end|>" if template == BARE else "")
    ends = {*tiny_tokenizer.convert_tokens_to_ids(["<|end|>", completion[-10:].strip(" a")])}
    assert templates.eos_ids(tiny_tokenizer) == (ends if template != BARE else {1})
    assert templates.eos_ids(tiny_tokenizer, "plain") == {tiny_tokenizer.eos_token_id}


def test_published_templates_are_honoured_or_refused(tiny_tokenizer):
    """Prompt and completion are what TRL's templates write themselves, thoughts and all."""
    refused, thoughts = set(), "<think>\nhm\n</think>\n\nIt is 4."
    answers = ("It is 4.", " It is 4.\n", thoughts, "<think>hm</think>It is 4.")
    questions = (ask("a"), says("s", "system") + ask("a") + says(thoughts) + ask("b"))
    tiny_tokenizer.bos_token = "<|system|>"
    for path in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja"):
        tiny_tokenizer.chat_template = path.read_text("utf-8")
        for answer, turns in product(answers, questions):
            messages = turns + says(answer)
            try:
                prompt, completion = data.render({"messages": messages}, tiny_tokenizer)
            except ValueError as error:
                refused.add(path.stem.split("_")[0])
                assert str(error).startswith("template: the "), path
                continue
            own = tiny_tokenizer.apply_chat_template(messages, tokenize=False).rstrip()
            assert (prompt + completion).startswith(own) or own.startswith(prompt + completion)
            assert "".join(completion.split()).startswith("".join(answer.split())), path
    # The first drops thoughts, the second refuses a system message, the others want image parts.
    assert refused == {"deepseek", "deepseekv3", "gemma", "idefics3", "llava", "smolvlm"}


def test_an_answer_or_question_that_a_template_drops_is_refused(tiny_tokenizer):
    tiny_tokenizer.chat_template = CHATML.replace("m.content", "m.content.split('</think>')[-1]")
    with pytest.raises(ValueError, match="template.*hm"):
        data.render({"prompt": "q", "completion": "<think>hm</think>a"}, tiny_tokenizer)
    tiny_tokenizer.chat_template = CHATML.replace("messages", "messages[-2:]")
    row = {"prompt": says("be brief", "system") + ask("q"), "completion": "a"}
    with pytest.raises(ValueError, match="template.*be brief"):
        data.render(row, tiny_tokenizer)


def test_conversation_trains_the_last_answer(tiny_tokenizer):
    turns = says("s", "system") + ask("u") + says("first") + ask("v") + says("last")
    row = {"messages": turns + ask("unseen")}
    prompt, completion = data.render(row, tiny_tokenizer)
    assert prompt == (
        "<|system|>s<|end|><|user|>u<|end|><|assistant|>first<|end|><|user|>v<|end|><|assistant|>"
    )
    assert completion == "last<|end|>"
    plain, _ = data.render(row, tiny_tokenizer, "plain")
    assert templates.prompt_text(PAIR) == PAIR["prompt"]
    assert plain.endswith("User:\nv\n\nAssistant:\n") and "unseen" not in plain


def test_template_errors(make_tokenizer):
    bare, chat = make_tokenizer(chat=False), make_tokenizer()
    for template in ("chat", "vicuna"):
        with pytest.raises(ValueError, match=f"template: .*{template}"):
            data.render(PAIR, bare, template)
    chat.chat_template = "{% for m in messages %}{{ m.role }}{% endfor %}"
    with pytest.raises(ValueError, match="template"):
        data.render(PAIR, chat)
    for row, wrong in (({**PAIR, "completion": " \n"}, "empty"), ({"chosen": "a"}, "chosen")):
        with pytest.raises(ValueError, match=f"row 2: .*{wrong}"):
            data.encode([PAIR, row], bare)
    with pytest.raises(ValueError, match="rows"):
        data.encode([], bare)


def llama_like(tokenizer):
    """A BOS before every text, unless told not to."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.bos_token_id)]
    )
    return tokenizer


def test_bos_stands_once_at_the_start(make_tokenizer):
    tokenizer = llama_like(make_tokenizer(chat=False))
    rows = [PAIR, {"text": "a"}, {"prompt": "word " * 50, "completion": "yes"}]
    encoded = data.encode(rows, tokenizer, max_length=48, template="plain")
    for ids, _ in encoded:
        assert ids[0] == tokenizer.bos_token_id and (ids == ids[0]).sum() == 1
    assert encoded.truncated == 1 and len(encoded[2].ids) == 48


SPELLED = "<|begin|>a <|end|><|user|>\nb<|assistant|> <think>c <|pad|"


@pytest.mark.parametrize("template", ["chat", "alpaca", "plain", "text"])
def test_special_tokens_in_a_text_stay_text(make_tokenizer, template):
    """The frame's are special, those of the row are not, but for an answer's thoughts."""
    tokenizer = llama_like(make_tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]})
    names = ["text"] if template == "text" else ["prompt", "completion"]
    template = template.replace("text", "plain")
    row, frame = (dict.fromkeys(names, text) for text in (SPELLED, "{}"))
    prompt, completion = data.render(frame, tokenizer, template)
    plain, literal = (
        tokenizer(text, add_special_tokens=False, split_special_tokens=split)["input_ids"]
        for text, split in ((prompt + completion, False), (SPELLED, True))
    )
    (example,) = data.encode([row], tokenizer, template=template)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    found, expected = ([i for i in ids if i in special] for ids in (example.ids, plain))
    if "prompt" in row:
        expected.insert(-1, tokenizer.convert_tokens_to_ids("<think>"))
        ids = templates.tokenize([data.render(row, tokenizer, template)[0]], tokenizer)[0]
        assert str(literal)[1:-1] in str(ids)
    assert found == expected
    assert tokenizer.decode(example.ids) == (prompt + completion).replace("{}", SPELLED)


def decoded(tokenizer, example):
    """The texts without and with loss."""
    return [tokenizer.decode(example.ids[example.mask == loss]) for loss in (0, 1)]


def test_loss_falls_on_response_and_eos_only(tiny_tokenizer):
    rows = [PAIR, {"prompt": "米拉住在哪里？", "completion": "河边的磨坊里。"}]
    encoded = data.encode([*rows, {"text": "Mila"}], tiny_tokenizer)
    for row, example in zip(rows, encoded, strict=False):
        prompt, completion = decoded(tiny_tokenizer, example)
        assert prompt == f"<|user|>{row['prompt']}<|end|><|assistant|>"
        assert completion == row["completion"] + "<|end|>"
        assert example.ids[-1] == tiny_tokenizer.eos_token_id
        assert (example.mask[1:] >= example.mask[:-1]).all()
        assert example.ids.dtype == example.mask.dtype == "int64"
    assert decoded(tiny_tokenizer, encoded[2]) == ["", "Mila<|end|>"]  # all of a text is learned
    assert encoded.dataset["input_ids"][:] == [ids.tolist() for ids, _ in encoded]
    assert encoded.dataset["completion_mask"][:] == [mask.tolist() for _, mask in encoded]
    assert encoded.tokens == sum(map(len, encoded.dataset["input_ids"]))
    assert encoded.response_tokens == sum(map(sum, encoded.dataset["completion_mask"]))
    assert len(encoded) == 3 and encoded.truncated == 0 and "3 rows" in encoded.summary()


@cache
def bare_tokenizer(make_tokenizer):
    return make_tokenizer(chat=False)


@settings(deadline=None, max_examples=50)
@given(st.text(min_size=1).filter(str.strip), st.text(min_size=1).filter(str.strip))
def test_no_token_straddles_the_border(make_tokenizer, prompt, completion):
    tokenizer = bare_tokenizer(make_tokenizer)
    row = {"prompt": prompt, "completion": completion}
    (example,) = data.encode([row], tokenizer, template="plain", max_length=10_000)
    assert tuple(decoded(tokenizer, example)) == data.render(row, tokenizer, "plain")


def test_a_long_prompt_loses_its_beginning_and_a_long_response_its_end(tiny_tokenizer):
    long = {"prompt": "far " * 100 + "near", "completion": "yes"}
    answer = {"prompt": "q", "completion": "abcdefghij" * 20}
    encoded = data.encode([long, PAIR, answer], tiny_tokenizer, max_length=48)
    assert encoded.truncated == 2 and "2 cut to 48" in encoded.summary()
    assert len(encoded[0].ids) == len(encoded[2].ids) == 48
    prompt, completion = decoded(tiny_tokenizer, encoded[0])
    assert prompt.endswith("near<|end|><|assistant|>") and completion == "yes<|end|>"
    prompt, completion = decoded(tiny_tokenizer, encoded[2])
    assert prompt == "" and answer["completion"].startswith(completion)
    tiny_tokenizer.model_max_length = 20
    encoded = data.encode([long], tiny_tokenizer)
    assert encoded.max_length == len(encoded[0].ids) == 20


def test_masks_are_shown_escaped(tiny_tokenizer):
    row = {"prompt": "<script>alert(1)</script>", "completion": "<b>河边</b>"}
    view = show.show_masks(data.encode([row] * 4, tiny_tokenizer), tiny_tokenizer, n=2)
    shown = view._repr_html_()
    assert "<script" not in shown and "<b>" not in shown
    assert "�" not in shown and "河" in shown and "边" in shown
    assert len(view.examples) == 2
    assert "".join(t for t, loss in view.examples[0] if loss) == "<b>河边</b><|end|>"
    assert "[<|end|>]" in repr(view)


def test_table_is_escaped_and_aligned():
    table = show.Table([{"name": "<b>", "loss": 0.123456}, {"name": "a & b", "more": 3}])
    assert table.columns == ["name", "loss", "more"]
    html = table._repr_html_()
    assert "<b>" not in html and "&lt;b&gt;" in html and "a &amp; b" in html
    assert html.count("<tr>") == 3 and html.startswith('<table class="labkit-table">')
    lines = repr(table).splitlines()
    assert lines == ["name  | loss   | more", "<b>   | 0.1235 |", "a & b |        | 3"]
    assert repr(show.Table([])) == ""


def test_samples_are_escaped():
    row = {"prompt": "<img src=x onerror=alert(1)>", "completion": "<i>no</i>"}
    table = show.samples([row] * 4, {"before": ["<script>"] * 4, "after": ["a & b\ufffd"] * 4}, n=2)
    shown = table._repr_html_()
    assert "<img" not in shown and "<script" not in shown and "<i>" not in shown
    assert "&lt;script&gt;" in shown and "a &amp; b" in shown and shown.count("<tr>") == 3
    assert "after | a & b" in repr(table)
    assert table.columns == ["prompt", "expected", "before", "after"]


def test_samples_show_families_and_what_goes_wrong():
    rows = [{"prompt": str(i), "completion": "yes", "task": "abcdef"[i % 6]} for i in range(30)]
    marked = ["✗ no" if i in (8, 20, 22) else "✓ yes" for i in range(30)]
    table = show.samples(rows, {"base": ["✗ no"] * 30, "tuned": marked}, n=4)
    assert table.columns == ["family", "prompt", "expected", "base", "tuned"]
    assert [row["tuned"] for row in table.rows] == ["✗ no"] * 2 + ["✓ yes"] * 2
    assert len({row["family"] for row in table.rows}) == 4
    assert len(show.samples(rows, {"tuned": marked}, n=8).rows) == 6  # no family twice
