"""Self-Instruct: a model writes its own instruction data from a few seed tasks (Wang et al. 2022).

    1. Eight tasks of a pool (six by hand, two generated) head a numbered list; the model goes on.
    2. What passes the filters, so nothing whose ROUGE-L F to a task in the pool is 0.7, joins it.
    3. The model is asked whether a task is classification. If so it writes label, then input, lest
       all inputs get one label; else input, then output. Bad instances are dropped.

    ROUGE-L F = 2 LCS(a, b) / (|a| + |b|),   over words, and over characters in Chinese

A *base* model can do it: everything is continuation of a text. Other than in the authors' code,
filters read Chinese, case is kept, numbers in a task do not end it, and nothing depends on the
order of a set. Left out: their templates for training, and the ban on "Write a program".
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

from labkit import data
from labkit.config import Count, Natural, Probability, settings
from labkit.formats import Row
from labkit.respond import Respond
from labkit.similarity import Nearest, language, tokens

Instance = tuple[str, str]  # input (may be empty) and output
SHOWN = 5  # examples kept of each reason to reject
HEAD = {"en": "Come up with a series of tasks:", "zh": "请想出一系列任务："}


@settings
class SelfInstructConfig:
    """`tasks` are wanted, and `requests` prompts for tasks made at most, `batch` at a time.

    A prompt shows `human` seed tasks and `generated` ones, of one language, below the line of that
    language in `heads` (a small model goes on best with a line that it has read).
    Lengths are of `tokens`: words, or Chinese characters. `shots`: seed tasks shown to
    ask for kind and instances (the paper's 31 do not fit into a small context). Without `filters`
    everything is kept that has an output.
    """

    tasks: Count = 1000
    requests: Count = 2000
    batch: Count = 16
    human: Count = 6
    generated: Natural = 2
    similarity: Probability = 0.7
    shortest: Count = 4
    longest: Count = 150
    shots: Count = 6
    instances: Count = 5
    filters: bool = True
    heads: dict[str, str] = field(default_factory=HEAD.copy)
    seed: int = 0


LABELS = {"en": ("Task: ", "Input: ", "Output: "), "zh": ("任务：", "输入：", "输出：")}
_FIELD = re.compile(r"^(Task|Input|Output|任务|输入|输出) *[:：]", re.MULTILINE)
KIND = {"en": "Is it classification? ", "zh": "这是分类吗？"}
KIND_HEAD = {
    "en": "Can the following task be regarded as a classification task with few output labels?",
    "zh": "下面的任务能看作只有少数几种答案的分类任务吗？",
}
YES_NO = {"en": ("Yes", "No"), "zh": ("是", "否")}
_LIST_NUMBER = re.compile(r"(?:\d+\s*[.)、．）](?!\d)|[(（]\d+[)）]|[一二三四五六七八九十]+、)")
_CLOSED = tuple(".。!！?？…\"”')）」]}`")  # how a text ends that was not cut
_MEDIA = re.compile(  # what text alone cannot answer, as whole words: neither "paragraph" nor a plot
    r"\b(?:images?|pictures?|videos?|audio|diagrams?|flow ?charts?|graphs?|screenshots?|files?)\b"
    r"|(?:^|\bplease |\bto )draw (?!(?:an? |the |some )?(?:conclusion|lesson|comparison|water))"
    r"|^(?:please )?plot (?!of\b|twist)|图片|图像|视频|音频|图表|流程图|截图|附件|画一[张幅个]",
    re.IGNORECASE,
)


@dataclass
class Task:
    """A task of the pool; a generated one knows its request, its rank there, and its nearest."""

    instruction: str
    lang: str
    request: int | None = None
    rank: int = 0
    nearest: str = ""
    similarity: float = 0.0


class Pool:
    """Seed tasks and accepted ones, in order, and the search for the most similar one."""

    def __init__(self, seeds: Sequence[Row] = ()) -> None:
        self.tasks: list[Task] = []
        self.nearest = Nearest()
        for row in seeds:
            self.add(Task(row["instruction"], row.get("lang") or language(row["instruction"])))

    def add(self, task: Task) -> None:
        self.tasks.append(task)
        self.nearest.add(task.instruction)

    def sample(self, rng: Random, config: SelfInstructConfig, lang: str) -> list[str]:
        """The tasks of a prompt; while few are generated, more of the seeds."""
        tasks = [t for t in self.tasks if t.lang == lang]
        seeds = [t.instruction for t in tasks if t.request is None]
        own = [t.instruction for t in tasks if t.request is not None]
        chosen = rng.sample(own, min(config.generated, len(own)))
        wanted = config.human + config.generated - len(chosen)
        chosen += rng.sample(seeds, min(wanted, len(seeds)))
        rng.shuffle(chosen)
        return [" ".join(text.split()).rstrip(":：") for text in chosen]


def prompt_of(pool: Pool, rng: Random, config: SelfInstructConfig, lang: str = "en") -> str:
    """The beginning of a numbered list of tasks, up to the number that comes next."""
    lines = [f"{i}. {text}" for i, text in enumerate(pool.sample(rng, config, lang), 1)]
    return "\n".join([config.heads[lang], *lines, f"{len(lines) + 1}."])


def parse_list(text: str, first: int = 1) -> list[str]:
    """The tasks in the continuation of a list whose number `first` stands in the prompt.

    Only the next number at the beginning of a line opens an item, so "in 16.5 hours" and a list
    within a task do not. A blank line ends the list. The last item is dropped if it was cut: no
    line follows, and no sentence ends there.
    """
    listed, ended, _ = text.lstrip().partition("\n\n")
    listed = re.sub(rf"^{first}[.)、．]\s*", "", listed)  # some repeat it
    items = [""]
    for line in listed.split("\n"):
        number = first + len(items)
        match = re.match(rf"\s*[(（]?{number}\s*[.)、．）](?!\d)|\s*{_chinese(number)}、", line)
        if match:
            items.append("")
            line = line[match.end() :]
        items[-1] += "\n" + line
    last, more, _ = items.pop().lstrip("\n").partition("\n")  # more may be another text
    items += [last] if ended or more or last.rstrip().endswith(_CLOSED) else []
    return [item.strip() for item in items if item.strip()]


def _chinese(number: int) -> str:
    digits, (tens, ones) = "〇一二三四五六七八九", divmod(number, 10)
    ten = ("" if tens < 2 else digits[tens % 10]) + "十" if tens else ""
    return ten + (digits[ones] if ones else "")


def keep(text: str, pool: Pool, config: SelfInstructConfig | None = None) -> str | None:
    """Why `text` may not join the pool, or None if it may: too short, too long, punctuation first
    (a quotation may open a task), rest of a list, not text, repeated, or too similar."""
    config, length = config or SelfInstructConfig(), len(tokens(text))
    if not config.shortest <= length <= config.longest:
        return "too short" if length < config.shortest else "too long"
    if _LIST_NUMBER.match(text):
        return "rest of a list"
    if not re.match(r"[\w\"'“‘「《(（$€£]", text):
        return "punctuation first"
    if _MEDIA.search(text):
        return "not text"
    score, _ = pool.nearest.find(text, config.similarity)
    return "repeated" if score == 1 else "too similar" if score else None


def classification_prompt(task: str, seeds: Sequence[Row], rng: Random, shots: int = 6) -> str:
    """Asks whether `task` has few possible outputs; half of the seed tasks shown have."""
    lang = language(task)
    label, (yes, no) = LABELS[lang][0], YES_NO[lang]
    shown = _shots(seeds, rng, shots // 2, lang, True)
    shown += _shots(seeds, rng, shots - len(shown), lang, False)
    rng.shuffle(shown)
    asked = [(r["instruction"], yes if r["classification"] else no) for r in shown] + [(task, "")]
    lines = [f"{label}{text}\n{KIND[lang]}{reply}".rstrip() for text, reply in asked]
    return "\n\n".join([KIND_HEAD[lang], *lines])


def _shots(seeds: Sequence[Row], rng: Random, n: int, lang: str, kind: bool) -> list[Row]:
    rows = [r for r in seeds if r["classification"] == kind and r["lang"] == lang]
    return rng.sample(rows, min(n, len(rows)))


def is_classification(reply: str) -> bool:
    """Whether the reply to `classification_prompt` begins with yes."""
    return bool(re.match(r"\s*(?:yes\b|是)", reply, re.IGNORECASE))


def instance_prompt(
    task: str, seeds: Sequence[Row], rng: Random, shots: int = 6, *, output_first: bool = False
) -> str:
    """Asks for input and output of `task`, after seed tasks of its kind, in this order or
    (`output_first`) in the other."""
    lang = language(task)
    name, given, output = LABELS[lang]
    texts = []
    for row in _shots(seeds, rng, shots, lang, output_first):
        lines = [f"{given}{row['input']}"] if row["input"] else []
        lines.insert(0 if output_first else 1, f"{output}{row['completion']}")
        texts.append("\n".join([f"{name}{row['instruction']}", *lines]))
    last = f"{name}{task}" + f"\n{output.strip()}" * output_first
    return "\n\n".join([*texts, last])


def parse_instance(reply: str, *, output_first: bool = False) -> tuple[list[Instance], bool]:
    """The instances in the reply to `instance_prompt`, and whether the last one was cut.

    It was not if another task or a blank line follows, or a sentence ends there.
    """
    lead = "Output:" if output_first and not _FIELD.match(reply.lstrip()) else ""
    parts = _FIELD.split(lead + reply.lstrip())
    groups: list[dict[str, str]] = []
    opening, ended = "output" if output_first else "input", False
    for name, content in zip(parts[1::2], parts[2::2], strict=True):
        if ended := name in ("Task", "任务"):
            break
        content, blank, _ = content.strip(" ").partition("\n\n")
        kind, ended = "output" if name in ("Output", "输出") else "input", bool(blank)
        if not groups or kind in groups[-1] or kind == opening:
            groups.append({})
        groups[-1][kind] = content.strip()
    found = [(group.get("input", ""), group.get("output", "")) for group in groups]
    cut = bool(found) and not ended and not "".join(parts[-1:]).strip().endswith(_CLOSED)
    return found, cut


def keep_instance(instance: Instance, others: Sequence[Instance] = ()) -> str | None:
    """Why an instance is dropped, or None; `others` are all instances of its task."""
    given, output = instance
    if not output:
        return "no output"
    if output.endswith((":", "：")) or given.endswith((":", "：")):
        return "open end"
    if " ".join(given.split()) == " ".join(output.split()):
        return "output is input"
    if given and any(g == given and o != output for g, o in others):
        return "other outputs"
    return None


@dataclass
class Generated:
    """`rows` to train on; why the rest was `rejected`, with a few `examples` of each reason."""

    rows: list[Row] = field(default_factory=list)
    tasks: list[Task] = field(default_factory=list)
    requests: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def reject(self, reason: str, text: str) -> None:
        self.rejected[reason] += 1
        if len(examples := self.examples.setdefault(reason, [])) < SHOWN:
            examples.append(text)


def read_seeds(file: str) -> list[Row]:
    """Seed tasks of a file that `data.load` knows, such as the paper's; of each its first instance."""
    seeds: dict[str, Row] = {}
    for row in data.load(file, split="all"):
        text = row.get("instruction") or row["prompt"]
        kind = bool(row.get("is_classification", row.get("classification")))
        seed = {"instruction": text, "input": row.get("input", ""), "prompt": row["prompt"]}
        seed |= {"completion": row["completion"], "lang": language(text), "classification": kind}
        seeds.setdefault(text, seed)
    return list(seeds.values())


def generate_tasks(
    respond: Respond,
    seeds: Sequence[Row],
    config: SelfInstructConfig | None = None,
    *,
    answer: Respond | None = None,
) -> Generated:
    """The whole method: new tasks, their kind, their instances.

    `seeds` have instruction, input, completion, lang and classification, as
    `tinytown.seed_tasks()`. `respond` continues the lists (the paper samples, at temperature 0.7),
    `answer` the other prompts (at 0); by default it is the same. All depends on the seeds, the
    config and what they respond. Rows have prompt, instruction, input, completion, lang,
    classification, and where the task comes from (see `Task`).
    """
    config = config or SelfInstructConfig()
    wanted = {"instruction", "input", "completion", "lang", "classification"}
    for number, row in enumerate(seeds, 1):
        if missing := sorted(wanted - set(row)):
            raise ValueError(f"seeds: seed {number}: expected {', '.join(missing)}, got {row!r}")
    if not seeds:
        raise ValueError("seeds: expected a task or more, got none")
    result = Generated()
    _generate_tasks(respond, Pool(seeds), config, result)
    _generate_instances(answer or respond, seeds, config, result)
    return result


def _in_batches(respond: Respond, prompts: list[str], batch: int) -> Iterator[str]:
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        replies = list(respond(part))
        if len(replies) != len(part):
            raise ValueError(f"respond: expected {len(part)} continuations, got {len(replies)}")
        yield from replies


def _generate_tasks(
    respond: Respond, pool: Pool, config: SelfInstructConfig, result: Generated
) -> None:
    languages = list(dict.fromkeys(task.lang for task in pool.tasks))
    while len(result.tasks) < config.tasks and result.requests < config.requests:
        start, prompts = result.requests, []
        result.requests = min(start + config.batch, config.requests)
        for request in range(start, result.requests):
            rng, lang = Random(f"{config.seed}-{request}"), languages[request % len(languages)]
            prompts.append(prompt_of(pool, rng, config, lang))
        replies = _in_batches(respond, prompts, config.batch)
        for request, (prompt, reply) in enumerate(zip(prompts, replies, strict=True), start):
            first = prompt.count("\n")
            for rank, text in enumerate(parse_list(reply, first)):
                if reason := keep(text, pool, config) if config.filters else None:
                    result.reject(reason, text)
                elif len(result.tasks) < config.tasks:
                    score, nearest = pool.nearest.find(text)
                    task = Task(text, language(text), request, rank, nearest, score)
                    pool.add(task)
                    result.tasks.append(task)


def _generate_instances(
    answer: Respond, seeds: Sequence[Row], config: SelfInstructConfig, result: Generated
) -> None:
    texts = [task.instruction for task in result.tasks]
    rngs = [Random(f"{config.seed}-kind-{text}") for text in texts]
    pairs = list(zip(texts, rngs, strict=True))
    prompts = [classification_prompt(text, seeds, rng, config.shots) for text, rng in pairs]
    kinds = [is_classification(reply) for reply in _in_batches(answer, prompts, config.batch)]
    prompts = [
        instance_prompt(text, seeds, rng, config.shots, output_first=kind)
        for (text, rng), kind in zip(pairs, kinds, strict=True)
    ]
    replies = _in_batches(answer, prompts, config.batch)
    for task, kind, reply in zip(result.tasks, kinds, replies, strict=True):
        found, cut = parse_instance(reply, output_first=kind)
        if not found:
            result.reject("no instance", f"{task.instruction}\n{reply}")
        for number, instance in enumerate(found[: config.instances], 1):
            reason = "cut" if cut and number == len(found) else keep_instance(instance, found)
            reason = reason or ("repeated instance" if instance in found[: number - 1] else None)
            if reason if config.filters else not instance[1]:
                result.reject(reason or "no output", "\n".join([task.instruction, *instance]))
                continue
            prompt = f"{task.instruction}\n{instance[0]}".strip()
            row: Row = {"prompt": prompt, "input": instance[0], "completion": instance[1]}
            row |= {"classification": kind, "task": "generated"}
            result.rows.append(row | vars(task))
