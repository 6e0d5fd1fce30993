"""Data: what loads, how it is converted, where loss falls, and what bad input says."""

import csv
import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit import data, templates

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
SEEDS = SHARED / "self_instruct_seed_tasks.jsonl"
TRANSCRIPTS = SHARED / "hh_harmless_base_test.jsonl.gz"
ALPACA_ROW = {"instruction": "Give an antonym.", "input": "hot", "output": "cold"}
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


# ---------------------------------------------------------------- real files, as they are


@needs(SEEDS)
def test_seed_tasks_load_as_they_are():
    parts = {s: data.load(str(SEEDS), split=s) for s in ("train", "validation", "test")}
    rows = [row for part in parts.values() for row in part]
    assert len(rows) == 175
    assert len({row["id"] for row in rows}) == 175  # the parts do not overlap
    raw = {task["id"]: task for task in map(json.loads, SEEDS.read_text("utf-8").splitlines())}
    for row in rows:
        instance = raw[row["id"]]["instances"][0]
        assert row["completion"] == instance["output"]
        assert row["prompt"].startswith(raw[row["id"]]["instruction"])
        assert instance["input"] in row["prompt"]


@needs(TRANSCRIPTS)
def test_transcripts_load_as_they_are():
    rows = [
        r for s in ("train", "validation", "test") for r in data.load(str(TRANSCRIPTS), split=s)
    ]
    assert len(rows) == 2312
    for row in rows:
        assert row["prompt"][0]["role"] == "user" and row["prompt"][-1]["role"] == "user"
        assert [m["role"] for m in row["chosen"]] == ["assistant"]
        assert [m["role"] for m in row["rejected"]] == ["assistant"]
        assert row["chosen"] != row["rejected"]
    with gzip.open(TRANSCRIPTS, "rt", encoding="utf-8") as file:
        first = json.loads(next(file))
    found = [row for row in rows if row["chosen"][0]["content"].startswith("No, sorry!  All of")]
    assert len(found) == 1 and first["chosen"].endswith(found[0]["chosen"][0]["content"])
    assert len(found[0]["prompt"]) == 5


@needs(SEEDS)
def test_seed_tasks_encode(tiny_tokenizer):
    encoded = data.encode(data.load(str(SEEDS), limit=20), tiny_tokenizer, max_length=128)
    assert len(encoded) == 20
    assert max(map(len, encoded.dataset["input_ids"])) == 128
    assert encoded.truncated > 0 and f"{encoded.truncated} cut to 128" in encoded.summary()


# ---------------------------------------------------------------- files


def test_the_same_rows_from_every_file_type(tmp_path):
    rows = [{"prompt": f'say "{i}",\nplease, 米拉', "completion": f"{i}\u2028."} for i in range(40)]
    write(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows), "utf-8")
    (tmp_path / "wrapped.json").write_text(json.dumps({"data": rows}), "utf-8")
    write(tmp_path / "lines.json", rows)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write((tmp_path / "a.jsonl").read_text("utf-8"))
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(rows)
    import datasets

    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    loaded = {path.name: data.load(str(path)) for path in tmp_path.iterdir()}
    assert len(loaded) == 7
    for name, got in loaded.items():
        assert len(got) == 36, name
        assert got == loaded["a.jsonl"], name
        assert all(row in rows for row in got)


@pytest.mark.parametrize("count, held", [(3, 1), (10, 1), (200, 10)])
def test_parts_of_a_file_are_disjoint_and_complete(tmp_path, count, held):
    path = write(tmp_path / "a.jsonl", [{"text": f"row {i}"} for i in range(count)])
    parts = [
        data.load(path, split=s, seed=s_) for s_, s in enumerate(("train", "validation", "test"))
    ]
    assert [len(part) for part in parts] == [count - 2 * held, held, held]
    assert {row["text"] for part in parts for row in part} == {f"row {i}" for i in range(count)}


def test_instances_of_one_task_stay_in_one_part(tmp_path):
    instances = [{"input": str(i), "output": "x"} for i in range(4)]
    rows = [{"id": i, "instruction": "do", "instances": instances} for i in range(30)]
    path = write(tmp_path / "a.jsonl", rows)
    parts = [data.load(path, split=s) for s in ("train", "validation", "test")]
    ids = [{row["id"] for row in part} for part in parts]
    assert [len(part) for part in parts] == [26 * 4, 2 * 4, 2 * 4]
    assert not ids[0] & ids[1] and not ids[0] & ids[2] and not ids[1] & ids[2]


def test_limit_samples_by_seed(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": f"row {i}"} for i in range(100)])
    assert len(data.load(path, limit=7)) == 7
    assert data.load(path, limit=7, seed=1) == data.load(path, limit=7, seed=1)
    assert data.load(path, limit=7, seed=1) != data.load(path, limit=7, seed=2)
    assert data.load(path, limit=1000) == data.load(path)


# ---------------------------------------------------------------- bad input


BAD_FILES = {
    "empty file": ("a.jsonl", b"", r"a\.jsonl is empty"),
    "only blank lines": ("a.jsonl", b"\n \n", r"a\.jsonl is empty"),
    "malformed line": (
        "a.jsonl", b'{"text": "a"}\n\n{"text": "b"\n{"text": "c"}\n', r"a\.jsonl, line 3: malformed",
    ),
    "no object": ("a.jsonl", b'{"text": "a"}\n[1]\n', r"a\.jsonl, line 2: expected an object"),
    "malformed json": ("a.json", b'[{"text": "a"},\n{"text": }]', r"a\.json, line 2: malformed"),
    "empty list": ("a.json", b"[]", r"a\.json holds no rows"),
    "json of a number": ("a.json", b"3", r"expected a list of objects, got int"),
    "not UTF-8": ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"line 2: expected UTF-8"),
    "not gzip": ("a.jsonl.gz", b'{"text": "a"}', r"not a whole gzip file"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(b'{"text": "a"}' * 9)[:-9], r"not a whole gzip file"),
    "short csv row": ("a.csv", b"prompt,completion\na,b\nc\n", r"a\.csv, line 3: expected 2 .*fewer"),
    "long csv row": ("a.csv", b"prompt,completion\na,b,c\n", r"a\.csv, line 2: expected 2 .*more"),
    "csv header only": ("a.csv", b"prompt,completion\n", r"a\.csv holds no rows"),
    "unknown suffix": ("a.txt", b"hello", r"ending in \.json, \.jsonl, \.csv, \.parquet.*a\.txt"),
    "no parquet": ("a.parquet", b"hello", r"a\.parquet is not a Parquet file"),
    "empty parquet": ("a.parquet", b"", r"a\.parquet is empty"),
    "row without column": (
        "a.jsonl",
        b'{"instruction": "a", "output": "b"}\n{"instruction": "a", "input": "b"}\n',
        r"a\.jsonl, row 2: expected the columns instruction, output .*no 'output' among instruction",
    ),
    "unknown columns": ("a.jsonl", b'{"foo": 1, "bar": 2}\n', r"row 1: no known format.* foo, bar"),
    "empty answer": (
        "a.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": " "}\n',
        r"row 2: 'completion' is empty",
    ),
    "wrong type": ("a.jsonl", b'{"prompt": "a", "completion": 7}\n', r"expected text, got int 7"),
    "half a character": ("a.jsonl", b'{"text": "\\ud83d"}\n', r"row 1: 'text': holds half"),
    "too few to split": ("a.jsonl", b'{"text": "a"}\n{"text": "b"}\n', r"has 2 rows, too few"),
}  # fmt: skip


@pytest.mark.parametrize("name, content, message", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file_gives_one_clear_message(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.load(str(tmp_path / name), split="test")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data: .*mine\.jsonl does not exist"):
        data.load(str(tmp_path / "mine.jsonl"))
    with pytest.raises(FileNotFoundError, match=r"mine\.jsonl does not exist"):
        data.load("mine.jsonl")
    with pytest.raises(ValueError, match="expected a file, got the folder"):
        data.load(str(tmp_path))


def test_bad_names_splits_and_limits(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'tinytown'"):
        data.load("tinytwon")
    with pytest.raises(ValueError, match="data: expected a name"):
        data.load("")
    path = write(tmp_path / "a.jsonl", [{"text": "a"}] * 3)
    with pytest.raises(ValueError, match="split: expected train, validation or test, got 'dev'"):
        data.load(path, split="dev")
    for limit in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="limit: expected a whole number from 1"):
            data.load(path, limit=limit)


def test_hub_without_network_says_so():
    with pytest.raises(ConnectionError, match="data: 'someone/something' could not be loaded"):
        data.load("someone/something")


def fake_hub(monkeypatch, sets):
    import datasets

    made = {name: datasets.Dataset.from_list(rows) for name, rows in sets.items()}
    calls = []
    monkeypatch.setattr(
        datasets, "load_dataset",
        lambda *args, **kwargs: calls.append((args, kwargs)) or datasets.DatasetDict(made),
    )  # fmt: skip
    return calls


def test_hub_set_uses_its_own_parts_and_cuts_the_missing(monkeypatch):
    rows = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(40)]
    calls = fake_hub(monkeypatch, {"train": rows, "test": [{"question": "qt", "answer": "at"}]})
    assert data.load("some/set:part", split="test") == [{"prompt": "qt", "completion": "at"}]
    assert calls[0][0] == ("some/set", "part")
    train, held = (data.load("some/set", split=s) for s in ("train", "validation"))
    assert len(train) == 38 and len(held) == 2
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held}
    with pytest.raises(ValueError, match="split: 'some/set' has train, test, got 'dev'"):
        data.load("some/set", split="dev")


def test_registered_set_leaves_broken_rows_out_and_says_so(monkeypatch, caplog):
    rows = [dict(ALPACA_ROW) for _ in range(30)] + [{**ALPACA_ROW, "output": ""}] * 30
    fake_hub(monkeypatch, {"train": rows})
    with caplog.at_level("WARNING", logger="labkit"):
        loaded = data.load("alpaca")
    assert 0 < len(loaded) < 31 and "rows left out" in caplog.text and "is empty" in caplog.text
    assert set(data.REGISTERED) == {"alpaca", "flan", "p3", "belle", "coig", "sharegpt", "hh-rlhf"}


# ---------------------------------------------------------------- formats


def test_alpaca_keeps_instruction_and_input():
    assert data.recognize(ALPACA_ROW) == "alpaca"
    row, bare = data.convert([ALPACA_ROW, {"instruction": "Say hi.", "output": "Hi"}], "x")
    assert row["prompt"] == "Give an antonym.\n\nhot" and row["completion"] == "cold"
    assert (row["instruction"], row["input"]) == ("Give an antonym.", "hot")
    assert bare["prompt"] == "Say hi." and "output" not in row


@pytest.mark.parametrize(
    "names", [("prompt", "completion"), ("prompt", "response"), ("question", "answer"),
              ("inputs", "targets"), ("inputs_pretokenized", "targets_pretokenized")],
)  # fmt: skip
def test_pairs_under_any_name(names):
    raw = {names[0]: "q", names[1]: "a", "id": 7}
    assert data.convert([raw], "x") == [{"prompt": "q", "completion": "a", "id": 7}]


def test_sharegpt_and_messages_agree():
    turns = [("human", "Hi"), ("gpt", "Hello"), ("human", "Bye"), ("gpt", "Good bye")]
    sharegpt = {"conversations": [{"from": f, "value": v} for f, v in turns]}
    roles = {"human": "user", "gpt": "assistant"}
    messages = {"messages": [{"role": roles[f], "content": v} for f, v in turns]}
    assert data.recognize(sharegpt) == "sharegpt" and data.recognize(messages) == "messages"
    assert data.convert([sharegpt], "x") == data.convert([messages], "x") == [messages]


def test_coig_questions_become_turns():
    turns = [{"question": "一加一？", "answer": "二"}, {"question": "再加一？", "answer": "三"}]
    (row,) = data.convert([{"instruction": "算术", "conversations": turns}], "x")
    assert [m["role"] for m in row["messages"]] == ["user", "assistant"] * 2
    assert row["messages"][0]["content"] == "算术\n\n一加一？"


def test_transcripts_share_the_prompt():
    begin = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: A\n\nHuman: B"
    raw = {"chosen": begin + "\n\nAssistant: good", "rejected": begin + "\n\nAssistant:"}
    assert data.recognize(raw) == "transcripts"
    (row,) = data.convert([raw], "x")
    assert [m["content"] for m in row["prompt"]] == ["Hi", "Hello", "A\n\nB"]
    assert row["chosen"] == [{"role": "assistant", "content": "good"}]
    assert row["rejected"] == [{"role": "assistant", "content": ""}]


def test_implicit_prompts_of_message_pairs_are_found():
    user = {"role": "user", "content": "q"}
    pair = {name: [user, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    for raw in (pair, {"prompt": "q", **pair}):
        (row,) = data.convert([raw], "x")
        assert row["prompt"] == [user] and row["chosen"][0]["content"] == "chosen"


def test_ranking():
    row = {"prompt": "q", "responses": ["a", "b", "c", "d"], "ranks": [3, 1, 2, 4]}
    assert data.recognize(row) == "ranking" and data.convert([row], "x") == [row]


BAD_ROWS = {
    "ranks": ({"prompt": "q", "responses": ["a", "b"], "ranks": [1]}, "2 responses and 1 ranks"),
    "tie": ({"prompt": "q", "responses": ["a", "b"], "ranks": [1, 1]}, "expected no ties"),
    "rank 0": ({"prompt": "q", "responses": ["a", "b"], "ranks": [0, 1]}, "whole numbers from 1"),
    "role": ({"messages": [{"role": "alien", "content": "x"}]}, "expected a role among"),
    "no answer": ({"messages": [{"role": "user", "content": "x"}]}, "answer of the assistant"),
    "no turns": ({"conversations": []}, "at least one message"),
    "no instances": ({"instruction": "x", "instances": []}, "'instances': expected a list"),
    "instance": ({"instruction": "x", "instances": [{"input": ""}]}, "expected {input, output}"),
    "no transcript": ({"chosen": "hello", "rejected": "bye"}, "expected a transcript"),
    "equal replies": (
        dict.fromkeys(("chosen", "rejected"), "\n\nHuman: a\n\nAssistant: b"), "to differ in a reply",
    ),
    "content": ({"messages": [{"role": "user", "content": ["x"]}]}, "expected text, got list"),
}  # fmt: skip


@pytest.mark.parametrize("row, message", BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_row_is_named(row, message):
    with pytest.raises(ValueError, match=f"data: mine, row 1: .*{message}"):
        data.convert([row], "mine")


# ---------------------------------------------------------------- templates


def test_alpaca_templates(make_tokenizer):
    tokenizer = make_tokenizer(chat=False)
    row, bare = data.convert([ALPACA_ROW, {"instruction": "Say hi.", "output": "Hi"}], "x")
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
    braces = {"prompt": "{input} {0}", "completion": "x"}
    assert "{input} {0}" in data.render(braces, tokenizer, "alpaca")[0]


@pytest.mark.parametrize(
    "template, prompt, completion",
    [
        (CHATML, "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "a<|im_end|>"),
        (LLAMA2, "[INST] q [/INST]", " a <|end|>"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
         "{% if add_generation_prompt %}assistant: {% endif %}",
         "user: q\nassistant: ", "a<|end|>"),
        ("{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}<think></think>"
         "{% endif %}{{ m.content }}{{ eos_token }}{% endfor %}"
         "{% if add_generation_prompt %}<|assistant|>{% endif %}",
         "<|user|>q<|end|><|assistant|>", "<think></think>a<|end|>"),
    ],
    ids=["chatml", "llama2", "no end token", "thinking"],
)  # fmt: skip
def test_chat_completion_ends_with_the_templates_end_token(
    tiny_tokenizer, template, prompt, completion
):
    tiny_tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tiny_tokenizer.chat_template = template
    row = {"prompt": "q", "completion": "a"}
    assert data.render(row, tiny_tokenizer) == (prompt, completion)


def test_conversation_trains_the_last_answer(tiny_tokenizer):
    texts = [("system", "s"), ("user", "u"), ("assistant", "first"), ("user", "v"),
             ("assistant", "last"), ("user", "unseen")]  # fmt: skip
    row = {"messages": [{"role": role, "content": text} for role, text in texts]}
    prompt, completion = data.render(row, tiny_tokenizer)
    assert prompt == (
        "<|system|>s<|end|><|user|>u<|end|><|assistant|>first<|end|><|user|>v<|end|><|assistant|>"
    )
    assert completion == "last<|end|>"
    plain, _ = data.render(row, tiny_tokenizer, "plain")
    assert plain.endswith("User:\nv\n\nAssistant:\n") and "unseen" not in plain
    with pytest.raises(ValueError, match="template: 'alpaca' takes one question.*4 messages"):
        data.render(row, tiny_tokenizer, "alpaca")


def test_template_errors(make_tokenizer):
    bare, chat = make_tokenizer(chat=False), make_tokenizer()
    with pytest.raises(ValueError, match="template: 'chat' needs a tokenizer with a chat template"):
        data.render(PAIR, bare, "chat")
    with pytest.raises(ValueError, match="template: expected one of auto, .*got 'vicuna'"):
        data.render(PAIR, bare, "vicuna")
    chat.chat_template = LLAMA2
    system = {
        "messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}]
    }
    with pytest.raises(ValueError, match="row 2: template: .*refuses.*System role not supported"):
        data.encode([PAIR, system], chat)
    chat.chat_template = "{% for m in messages %}{{ m.role }}{% endfor %}"
    with pytest.raises(ValueError, match="leaves the assistant's text out"):
        data.render(PAIR, chat)
    preference = {"prompt": "q", "chosen": "a", "rejected": "b"}
    with pytest.raises(
        ValueError, match=r"row 1: expected a row with prompt and completion.*chosen"
    ):
        data.encode([preference], make_tokenizer())


def with_begin_token(make_tokenizer):
    """Like Llama's: a begin token is put before every text, unless told not to."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(chat=False)
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.bos_token_id)]
    )
    return tokenizer


def test_begin_token_stands_once_at_the_start(make_tokenizer):
    tokenizer = with_begin_token(make_tokenizer)
    for row in (PAIR, {"text": "hello"}):
        (ids,) = data.encode([row], tokenizer, template="plain").dataset["input_ids"]
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    row = {"prompt": "word " * 50, "completion": "yes"}
    (ids,) = data.encode([row], tokenizer, max_length=12, template="plain").dataset["input_ids"]
    assert len(ids) == 12 and ids[0] == tokenizer.bos_token_id


# ---------------------------------------------------------------- encode


def parts(tokenizer, row):
    """The texts without and with loss, decoded."""
    pairs = list(zip(row["input_ids"], row["completion_mask"], strict=True))
    return [tokenizer.decode([i for i, m in pairs if m == keep]) for keep in (0, 1)]


def test_loss_falls_on_response_and_end_token_only(tiny_tokenizer):
    rows = [PAIR, {"prompt": "米拉住在哪里？", "completion": "河边的磨坊里。"}]
    encoded = data.encode(rows, tiny_tokenizer)
    for row, example in zip(rows, encoded.dataset, strict=True):
        prompt, completion = parts(tiny_tokenizer, example)
        assert prompt == f"<|user|>{row['prompt']}<|end|><|assistant|>"
        assert completion == row["completion"] + "<|end|>"
        assert example["input_ids"][-1] == tiny_tokenizer.eos_token_id
        first = example["completion_mask"].index(1)
        assert all(example["completion_mask"][first:])
    assert encoded.tokens == sum(map(len, encoded.dataset["input_ids"]))
    assert encoded.response_tokens == sum(map(sum, encoded.dataset["completion_mask"]))
    assert encoded.truncated == 0 and "2 rows" in encoded.summary()


_CACHE: dict = {}


@settings(deadline=None, max_examples=50)
@given(st.text(min_size=1).filter(str.strip), st.text(min_size=1).filter(str.strip))
def test_no_token_straddles_the_border(make_tokenizer, prompt, completion):
    tokenizer = _CACHE.get("bare") or _CACHE.setdefault("bare", make_tokenizer(chat=False))
    row = {"prompt": prompt, "completion": completion}
    (example,) = data.encode([row], tokenizer, template="plain", max_length=10_000).dataset
    ids, mask = example["input_ids"], example["completion_mask"]
    border = mask.index(1)
    rendered = data.render(row, tokenizer, "plain")
    for text, part in zip(rendered, (ids[:border], ids[border:]), strict=True):
        assert tokenizer.decode(part) == text


def test_long_prompt_loses_its_beginning_and_is_counted(tiny_tokenizer):
    long = {"prompt": "far " * 100 + "near", "completion": "yes"}
    encoded = data.encode([long, PAIR], tiny_tokenizer, max_length=48)
    assert encoded.truncated == 1 and "1 cut to 48" in encoded.summary()
    prompt, completion = parts(tiny_tokenizer, encoded.dataset[0])
    assert len(encoded.dataset[0]["input_ids"]) == 48
    assert prompt.endswith("near<|end|><|assistant|>") and completion == "yes<|end|>"


def test_long_response_loses_its_end_and_is_counted(tiny_tokenizer):
    row = {"prompt": "q", "completion": "abcdefghij" * 20}
    encoded = data.encode([row], tiny_tokenizer, max_length=16)
    prompt, completion = parts(tiny_tokenizer, encoded.dataset[0])
    assert encoded.truncated == 1 and len(encoded.dataset[0]["input_ids"]) == 16
    assert prompt == "" and row["completion"].startswith(completion)


def test_the_tokenizers_own_limit_holds(tiny_tokenizer):
    tiny_tokenizer.model_max_length = 20
    encoded = data.encode([{"prompt": "far " * 100, "completion": "yes"}], tiny_tokenizer)
    assert encoded.max_length == 20 and len(encoded.dataset[0]["input_ids"]) == 20


def test_plain_text_carries_loss_everywhere(tiny_tokenizer):
    (example,) = data.encode([{"text": "Mila bakes bread."}], tiny_tokenizer).dataset
    assert all(example["completion_mask"])
    assert tiny_tokenizer.decode(example["input_ids"]) == "Mila bakes bread.<|end|>"


def test_all_masked_example_is_named(tiny_tokenizer):
    for empty in ("", " \n"):
        with pytest.raises(
            ValueError, match=r"rows: row 2: the response is empty.*mask is all zero"
        ):
            data.encode([PAIR, {"prompt": "q", "completion": empty}], tiny_tokenizer)


def test_encode_refuses_nothing_and_silly_lengths(tiny_tokenizer):
    with pytest.raises(ValueError, match="rows: expected at least one row"):
        data.encode([], tiny_tokenizer)
    with pytest.raises(ValueError, match="max_length: expected a whole number of tokens from 2"):
        data.encode([PAIR], tiny_tokenizer, max_length=0)


def test_pad_must_not_be_the_end_token():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<e>": 0, "q": 1, "a": 2}, unk_token=None))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<e>", pad_token="<e>")
    with pytest.raises(ValueError, match="pad_token"):
        data.encode([{"prompt": "q", "completion": "a"}], tokenizer, template="plain")


# ---------------------------------------------------------------- what is shown


def test_masks_are_shown_escaped(tiny_tokenizer):
    row = {"prompt": "<script>alert(1)</script>", "completion": "<b>河边</b>"}
    view = data.show_masks(data.encode([row], tiny_tokenizer), tiny_tokenizer)
    shown = view._repr_html_()
    assert "<script" not in shown and "<b>河" not in shown
    assert "�" not in shown and "河" in shown and "边" in shown
    assert "".join(t for t, loss in view.examples[0] if loss) == "<b>河边</b><|end|>"
    assert "[<|end|>]" in repr(view)


def test_prompt_text_reads_like_the_row():
    assert templates.prompt_text(PAIR) == PAIR["prompt"]
    assert templates.prompt_text({"text": "x"}) == ""


def test_import_is_light():
    heavy = "torch", "transformers", "datasets", "pyarrow"
    code = (f"import sys, labkit.data, labkit.evaluation; "
            f"print([m for m in {heavy!r} if m in sys.modules])")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
