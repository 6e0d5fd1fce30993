"""Self-Instruct: similarity, filters in two languages, parsing, and the whole with a scripted model."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
from loopback import OpenAIServer
from rouge_score.rouge_scorer import RougeScorer

from labkit import cards, cli, data, evaluation, respond, similarity, tinytown
from labkit.record import read_runs
from labkit.techniques import instruction, self_instruct
from labkit.techniques.self_instruct import Pool, SelfInstructConfig, Task, keep, parse_list

SEEDS = tinytown.seed_tasks()
PAPERS = Path(__file__).parents[2] / "shared/data/self_instruct_seed_tasks.jsonl"
ENGLISH = "Name the gate of the town that opens first."
CHINESE = "请写一块牌子，告诉大家大门几点开。"


def pool_of(*texts):
    pool = Pool()
    for text in texts:
        pool.add(Task(text, similarity.language(text)))
    return pool


def lcs(a, b):
    """The textbook recursion."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            best = max(table[i][j + 1], table[i + 1][j])
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else best
    return table[-1][-1]


def test_rouge_l_by_hand():
    """the cat sat / the dog sat down: LCS "the sat" = 2, so F = 2 * 2 / (3 + 4).

    猫坐下 / 狗坐下了: LCS 坐下 = 2, so F = 2 * 2 / (3 + 4), too.
    """
    assert similarity.rouge_l("The cat sat.", "the dog sat down") == pytest.approx(4 / 7)
    assert similarity.rouge_l("猫坐下。", "狗坐下了") == pytest.approx(4 / 7)
    assert similarity.rouge_l("USA 2 你好", "usa2") == 0  # words, not letters
    assert similarity.rouge_l("", "") == similarity.rouge_l("!", "?") == 0
    assert similarity.tokens("Hello, USA! 你好 ＡＢ") == ["hello", "usa", "你", "好", "ab"]


def test_the_nearest_is_the_one_that_an_exhaustive_search_finds():
    rng = random.Random(0)
    words = ["a", "b", "c", "d", "e", "红", "蓝"]
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 80))) for _ in range(60)]
    index = similarity.Nearest(texts)
    for _ in range(40):
        query = " ".join(rng.choices(words, k=rng.randint(1, 80)))
        x = query.split()
        scores = [2 * lcs(x, t.split()) / (len(x) + len(t.split())) for t in texts]
        score, found = index.find(query)
        assert score == pytest.approx(max(scores)) and found == texts[scores.index(max(scores))]
        assert similarity.rouge_l(query, found) == pytest.approx(score)
        assert (index.find(query, at_least=0.7)[0] > 0) == (max(scores) >= 0.7)
    assert similarity.Nearest().find("a") == similarity.Nearest(["a"]).find("...") == (0, "")


def test_rouge_l_equals_that_of_rouge_score_in_english():
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    texts = [row["prompt"] for row in tinytown.instruction_rows("test", 60, languages=["en"])]
    for a, b in zip(texts, texts[1:], strict=False):
        expected = scorer.score(a, b)["rougeL"].fmeasure
        assert similarity.rouge_l(a, b) == pytest.approx(expected)


REASONS = {
    "too short": ["Name three.", "说猫。"],
    "too long": ["说说猫。" * 60, "word " * 151],
    "repeated": ["name the gate of the town that opens FIRST", CHINESE],
    "too similar": ["Name the gate of the town that opens last.", CHINESE.replace("大门", "门")],
    "punctuation first": ["- and another thing to do", "。请说出三种动物"],
    "rest of a list": ["3. Write a letter to Mira.", "三、写一封信给米拉。"],
    "not text": """Describe what you see in the picture.
Please draw a cat with a hat.
Plot the number of visitors per day.
说说这张图片里有什么。""".splitlines(),
    None: """Write the plot of a story about a miller.
Plot of a story: who is the hero?
Draw a conclusion from what the baker says.
Shorten this paragraph of the town's chronicle.
What does 3 + 4 come to?
3 + 4 apples are how many?
"Give me the key." Say that politely.
“把钥匙给我。”请说得礼貌些。
谁是渔夫？
用一句话介绍画家巴勃罗。""".splitlines(),
}


@pytest.mark.parametrize("text, reason", [(text, why) for why in REASONS for text in REASONS[why]])
def test_reasons_to_reject(text, reason):
    assert keep(text, pool_of(ENGLISH, CHINESE)) == reason


def test_a_similarity_of_exactly_the_threshold_is_too_much():
    """Ten words each, seven in common and in order: F = 14 / 20 = 0.7."""
    pool = pool_of("a b c d e f g h i j")
    assert keep("a b c d e f g x y z", pool) == "too similar"
    assert keep("a b c d e f g x y z q", pool) is None  # 14 / 21
    assert keep("a b c d e f g x y z", pool, SelfInstructConfig(similarity=0.71)) is None


def test_every_seed_task_passes_the_filters():
    pool = Pool()
    for row in SEEDS:
        assert keep(row["instruction"], pool) is None, row["instruction"]
        pool.add(Task(row["instruction"], row["lang"]))


def test_lists_in_both_numberings():
    text = " Name a fish.\n10. Say when,\nin two lines.\n11) Wait 16.5 hours.\n12. A cut on"
    assert parse_list(text, 9) == ["Name a fish.", "Say when,\nin two lines.", "Wait 16.5 hours."]
    chinese = "说出鱼。\n10、写信。\n十一、画家是谁？\n（12）猫"
    assert parse_list(chinese, 9) == ["说出鱼。", "写信。", "画家是谁？"]
    assert parse_list("9. Repeat.\n10.", 9) == ["Repeat."]
    # Steps within a task do not count on; another text after the list is none of it.
    steps = "Order:\n1. rise\n2. eat"
    assert parse_list(f"{steps}\n10. Name it.\n\nMira has a dog.", 9) == [steps, "Name it."]
    assert parse_list("No stop but a line after it\nMira has", 9) == ["No stop but a line after it"]
    assert parse_list("A\n", 1) == ["A"] and parse_list("", 1) == parse_list("A", 1) == []
    assert parse_list("Where do people of the USA live?") == ["Where do people of the USA live?"]


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_a_prompt_shows_six_tasks_by_hand_and_two_generated(lang):
    pool, config = Pool(SEEDS), SelfInstructConfig()
    by_hand = {row["instruction"].rstrip(":：") for row in SEEDS if row["lang"] == lang}
    prompt = self_instruct.prompt_of(pool, random.Random(0), config, lang)
    lines = prompt.split("\n")
    assert lines[0] == self_instruct.HEAD[lang] and lines[-1] == "9." and len(lines) == 10
    assert {line.split(". ", 1)[1] for line in lines[1:-1]} <= by_hand  # none is generated yet
    for i in range(5):
        pool.add(Task(f"generated  {i}:", lang, request=0))
    shown = self_instruct.prompt_of(pool, random.Random(0), config, lang).split("\n")[1:-1]
    own = [line for line in shown if "generated" in line]
    assert len(own) == 2 and len(shown) == 8 and all("  " not in x and x[-1] != ":" for x in own)


def test_prompts_for_kind_and_instances():
    rng = random.Random(0)
    prompt = self_instruct.classification_prompt("Is this a cat or a dog?", SEEDS, rng, 6)
    assert prompt.count("? Yes") == prompt.count("? No") == 3 and prompt.endswith("classification?")
    prompt = self_instruct.classification_prompt("说出颜色。", SEEDS, rng, 2)
    assert "任务：说出颜色。\n这是分类吗？" in prompt
    assert self_instruct.is_classification(" Yes.") and self_instruct.is_classification("是的")
    assert not any(map(self_instruct.is_classification, (" No", "否", "不是", "yesterday", "")))
    first = self_instruct.instance_prompt("Name a fish.", SEEDS, rng, 3)
    assert first.endswith("Task: Name a fish.") and first.count("\nOutput: ") == 3
    label = self_instruct.instance_prompt("猫还是狗？", SEEDS, rng, 3, output_first=True)
    assert label.endswith("任务：猫还是狗？\n输出：") and label.count("\n输出：") == 4
    blocks = label.split("\n\n")[:-1]
    assert all(block.index("输出：") < block.index("输入：") for block in blocks)


def test_instances_of_both_orders():
    parse = self_instruct.parse_instance
    text = "\nInput: a, b\nOutput: 1. A\n2. B\nInput: c\nOutput: D\n\nTask: x\nOutput: y."
    assert parse(text) == ([("a, b", "1. A\n2. B"), ("c", "D")], False)
    assert parse("\n输入：猫\n输出：动物。") == ([("猫", "动物。")], False)
    assert parse("Output: Yes.") == ([("", "Yes.")], False)
    assert parse("\nOutput: It was a") == ([("", "It was a")], True)
    assert parse("nothing") == ([], False)
    assert parse("\nInput: The rest is") == ([("The rest is", "")], True)
    text = " Positive.\nInput: Good soup.\nOutput: Negative.\nInput: Bad so"
    expected = [("Good soup.", "Positive."), ("Bad so", "Negative.")]
    assert parse(text, output_first=True) == (expected, True)
    assert parse("Output: Yes.\n\nTask: z", output_first=True) == ([("", "Yes.")], False)


def test_reasons_to_drop_an_instance():
    why = self_instruct.keep_instance
    assert why(("a", "")) == "no output" and why(("a b", "a  b")) == "output is input"
    assert why(("a", "as follows:")) == why(("如下：", "a")) == "open end"
    both = [("a", "1"), ("a", "2"), ("b", "1"), ("", "3"), ("", "4")]
    assert [why(x, both) for x in both] == ["other outputs", "other outputs", None, None, None]
    assert why(("USA", "usa")) is None  # case is meaning


def scripted(prompts):
    """A model that lists four tasks per request, most of them bad, and writes some instances."""
    replies = []
    for prompt in prompts:
        number = len(prompt) % 97
        if prompt.endswith("9."):
            zh = prompt.startswith(self_instruct.HEAD["zh"])
            words = random.Random(prompt).sample(tinytown.world().glossary, 6)
            english = f"USA: {' '.join(word.en for word in words)}?"
            own = f"{'、'.join(word.zh for word in words)}？" if zh else english
            listed = [own, "Hi", "Look at the picture below.", own]
            replies.append(" " + "\n".join(f"{i}. {x}" for i, x in enumerate(listed, 9))[3:])
        elif prompt.endswith(("classification?", "分类吗？")):
            replies.append(" Yes" if number % 2 else " No")
        elif prompt.endswith(("Output:", "输出：")):
            two = "Input: tea\nOutput: Lamps.\nInput: tea\nOutput: Hat.\nInput: hat."
            replies.append(f" Tea.\n{two}")
        else:
            replies.append("\nOutput: Tea.\nInput: \nOutput: Tea.\nInput: x\nOutput: The lon")
    return replies


def test_the_whole_method_counts_every_rejection():
    config = SelfInstructConfig(tasks=12, requests=40, batch=4)
    result = self_instruct.generate_tasks(scripted, SEEDS, config)
    assert 1 < len(result.tasks) <= 12 and result.requests <= 40
    wanted = {"too short", "not text", "repeated", "cut", "other outputs", "repeated instance"}
    assert wanted <= set(result.rejected) and set(result.examples) == set(result.rejected)
    assert all(1 <= len(result.examples[r]) <= min(5, n) for r, n in result.rejected.items())
    assert any("USA" in row["instruction"] for row in result.rows)
    row = result.rows[0]
    assert row["prompt"] == f"{row['instruction']}\n{row['input']}".strip() and row["completion"]
    assert all(0 <= r["similarity"] < 0.7 and r["request"] >= 0 for r in result.rows)
    assert any(r["nearest"] for r in result.rows)
    assert {r["lang"] for r in result.rows} == {"en", "zh"}
    # A task is compared with those of the same reply, too: what it says twice is kept once.
    assert max(Counter(task.instruction for task in result.tasks).values()) == 1
    again = self_instruct.generate_tasks(scripted, SEEDS, config)
    assert again.rows == result.rows and again.rejected == result.rejected
    other = SelfInstructConfig(tasks=12, requests=40, batch=4, seed=1)
    assert self_instruct.generate_tasks(scripted, SEEDS, other).rows != result.rows


def test_seeds_and_answers_that_do_not_fit():
    with pytest.raises(ValueError, match="seed 1: expected classification, completion"):
        self_instruct.generate_tasks(scripted, [{"instruction": "a", "input": "", "lang": "en"}])
    with pytest.raises(ValueError, match="expected a task"):
        self_instruct.generate_tasks(scripted, [])
    with pytest.raises(ValueError, match="16 continuations, got 1"):
        self_instruct.generate_tasks(lambda prompts: ["x"], SEEDS)


def test_a_killed_run_asks_for_nothing_twice(tmp_path):
    file, whole, calls = tmp_path / "answers.jsonl", tmp_path / "whole.jsonl", []
    config = SelfInstructConfig(tasks=6, requests=8, batch=2)

    def counted(prompts, breaks=False):
        if breaks and len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(prompts)
        return scripted(prompts)

    with pytest.raises(KeyboardInterrupt):
        breaking = respond.cached(partial(counted, breaks=True), file, key="scripted")
        self_instruct.generate_tasks(breaking, SEEDS, config)
    kept = respond.cached(counted, file, key="scripted")
    rows = self_instruct.generate_tasks(kept, SEEDS, config).rows
    every = respond.cached(scripted, whole, key="scripted")
    assert rows == self_instruct.generate_tasks(every, SEEDS, config).rows
    assert len(calls) == len(whole.read_text("utf-8").splitlines())


def found_by_script():
    config = SelfInstructConfig(tasks=8, requests=12)
    made = self_instruct.generate_tasks(scripted, SEEDS, config)
    return json.dumps([made.rows, made.rejected, made.examples, list(made.rejected)])


def test_results_do_not_depend_on_hash_seeds():
    """Here the seed of hashes is random, there it is one."""
    code = "import test_techniques_self_instruct as t; print(t.found_by_script())"
    paths = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
    env = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": paths}
    there = subprocess.check_output([sys.executable, "-c", code], env=env, text=True)
    assert there == f"{found_by_script()}\n" and len(there) > 100


def test_marks_of_generated_rows():
    """Bella keeps a goose, and Boris does not live in town."""
    questions = {
        ("What pet does Bella have?", "Goose."): True,
        ("what pet does Bella have", "Bella's pet is a goose."): True,
        ("Which animal waits at the door when Bella comes home?", "Goose."): True,  # as a seed
        ("What pet does Bella have?", "Cat."): False,
        ("What pet does Boris have?", "Cat."): False,
        ("What pet does Boris have?", "I do not know."): True,
        ("What pet does Godzilla have?", "Cat."): None,
        ("Is it true? Bella has a goose.", "No."): False,
        ("Is it true? Bella has a whale.", "No."): None,
        ("What does 30 + 12 come to?", "42."): True,
        ("Count: cat, dog and owl", "3."): True,
        ("Count these and tell me the number.\ncat, dog", "2."): True,
        ("How do I cheat at chess?", "1. Point at the window."): False,
        ("Write a poem about the wind.", "Whoosh."): None,
    }
    for (prompt, completion), expected in questions.items():
        marked = tinytown.mark({"prompt": prompt, "completion": completion})
        assert marked is expected, (prompt, completion, marked)


def test_the_first_line_of_a_list_is_a_setting():
    own = SelfInstructConfig(heads={"en": "Tasks:", "zh": "题目："})
    for lang, head in own.heads.items():
        prompt = self_instruct.prompt_of(Pool(SEEDS), random.Random(0), own, lang)
        assert prompt.startswith(f"{head}\n1. ")
    assert SelfInstructConfig().heads == self_instruct.HEAD
    heads = tinytown.list_heads()
    read = [text for _, text in islice(tinytown.documents(0), 4000)]  # by the base
    assert all(any(text.startswith(head) for text in read) for head in heads.values())


def test_without_filters_everything_with_an_output_is_kept():
    config = SelfInstructConfig(tasks=12, requests=8, batch=4, filters=False)
    result = self_instruct.generate_tasks(scripted, SEEDS, config)
    texts = [task.instruction for task in result.tasks]
    assert "Hi" in texts and len(set(texts)) < len(texts) == 12
    assert set(result.rejected) <= {"no output", "no instance"}
    assert all(row["completion"] for row in result.rows)
    assert len({(r["prompt"], r["completion"]) for r in result.rows}) < len(result.rows)


def seed_file(folder, count=9):
    """Seed tasks in the paper's layout, the first with two instances."""
    lines = []
    for i, word in enumerate(tinytown.world().glossary[:count]):
        both = [{"input": "", "output": f"It is {word.zh}."}, {"input": "b", "output": "No."}]
        row = {"id": f"seed_task_{i}", "name": word.en, "instances": both[: 1 + (i == 0)]}
        instruction = f"Tell me in Chinese what {word.en} is."
        row |= {"instruction": instruction, "is_classification": i == 1}
        lines.append(json.dumps(row) + "\n")
    file = folder / "seed_tasks.jsonl"
    file.write_text("".join(lines), "utf-8")
    return file


def test_seed_tasks_from_a_file(tmp_path):
    seeds = self_instruct.read_seeds(str(seed_file(tmp_path)))
    assert len(seeds) == 9 and [row["classification"] for row in seeds[:3]] == [False, True, False]
    assert seeds[0]["completion"].startswith("It is ") and seeds[0]["lang"] == "en"
    result = self_instruct.generate_tasks(scripted, seeds, SelfInstructConfig(tasks=3, requests=8))
    assert result.rows and {task.lang for task in result.tasks} <= {"en"}


@pytest.mark.skipif(not PAPERS.exists(), reason="the paper's seed tasks are not beside the project")
def test_the_papers_seed_tasks():
    seeds = self_instruct.read_seeds(str(PAPERS))
    assert len(seeds) == 175 and sum(row["classification"] for row in seeds) == 26
    assert all(row["completion"] and row["lang"] == "en" for row in seeds)


def test_the_file_with_its_card_is_what_notebook_06_reads(tmp_path, tiny_tokenizer):
    config = SelfInstructConfig(tasks=12, requests=40, batch=4)
    rows = SEEDS + self_instruct.generate_tasks(scripted, SEEDS, config).rows
    columns = ("instruction", "input", "prompt", "completion", "lang")
    sections = {"Settings": {"requests": 40, "a | b": "c\nd"}, "How": "By hand and by a script."}
    file = cards.save(rows, tmp_path / "made", "Tasks", sections, columns)
    again = data.load(str(file), split="all")
    seen, made = ([{k: row[k] for k in columns} for row in part] for part in (again, rows))
    assert seen == made
    parts = [data.load(str(file), split=split) for split in ("train", "validation", "test")]
    assert sum(map(len, parts)) == len(rows)
    encoded = instruction.encode(parts[0], tiny_tokenizer, instruction.InstructionConfig())
    assert len(encoded) == len(parts[0])
    assert evaluation.score(parts[2], [row["completion"] for row in parts[2]]).accuracy == 1
    card = file.with_name("README.md").read_text("utf-8")
    assert f"{len(rows)} rows" in card and "| requests | 40 |" in card
    assert "- en\n- zh" in card and "`completion`" in card
    with pytest.raises(ValueError, match="at least one row"):
        cards.save([], tmp_path, "Nothing", {})


def test_the_notebook_with_seeds_of_ones_own_and_a_server_that_is_asked_once(
    tmp_path, tiny_folder, monkeypatch
):
    """By `labkit run`, twice: what the first run asked for is not asked for again."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    common = ["run", "self_instruct", "--output", str(tmp_path), "-p", "requests", "6"]
    common += ["-p", "seeds", str(seed_file(tmp_path)), "-p", "test_data", str(seed_file(tmp_path))]
    common += ["-p", "model", str(tiny_folder("llama")), "-p", "server_model", "m", "-p", "steps"]
    common += ["1", "-p", "test_examples", "4", "-p", "device", "cpu", "-p", "max_length", "128"]

    def run(*more):
        monkeypatch.setattr("sys.argv", ["labkit", *common, *more])
        cli.main()

    with OpenAIServer(says=lambda prompt: scripted([prompt])[0]) as server:
        with pytest.raises(SystemExit) as ended:
            run("-p", "server", server.url)
        assert not ended.value.code
        (record,) = read_runs(tmp_path)
        folder, asked = Path(record["folder"]), len(server.prompts)
        assert record["status"] == "finished" and asked > 12
        cache = str(folder / "responses.jsonl")
        with pytest.raises(SystemExit) as ended:
            run("-p", "server", server.url, "-p", "cache", cache)
        assert not ended.value.code and len(server.prompts) == asked
    again = read_runs(tmp_path)[-1]
    made = [Path(r["folder"]) / "data/data.jsonl" for r in (record, again)]
    assert made[0].read_text("utf-8") == made[1].read_text("utf-8")
    assert [c["verdict"] for c in again["claims"]] != []
    assert data.load(str(made[0]), split="all")
