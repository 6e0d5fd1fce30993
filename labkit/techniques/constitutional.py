"""Constitutional AI: a model's feedback, by written principles, in place of people's (Bai et al. 2022).

    supervised      response → critique by a principle → revision, again and again; SFT on revisions
    reinforcement   p = probability that a is the better one of two responses, from the letters of a
                    comparison asked in both orders; a preference model or DPO learns p as it is:

    L = -p log sigma(z) - (1 - p) log sigma(-z),    z = beta · h of DPO, or r_a - r_b of a reward model

A principle is drawn for each revision and comparison, and a critique sees the prompt (the chapter's
5.7.3 shows it the response alone). Who is asked is a `Respond`, so a model here or on a server; in
which words, says the constitution. Left out: chains of thought before a comparison.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from pydantic import TypeAdapter
from torch import Tensor, nn

from labkit import generate, logprobs, models, training
from labkit.batching import Example, pack
from labkit.config import settings
from labkit.formats import Row
from labkit.pairs import Pair, PairBatch, encode_pairs, pack_pairs
from labkit.respond import Respond
from labkit.techniques import dpo, reward
from labkit.templates import prompt_text

logger = logging.getLogger("labkit")
FILE = Path(__file__).with_name("constitution.yaml")
_TALK = "{examples}Human: {prompt}\n\nAssistant: {response}\n\n"
_CRITIQUE = _TALK + "CritiqueRequest: {critic}\n\nCritique:"
_COMPARISON = "Consider this conversation.\n\nHuman: {prompt}\n\n{comparison}\n(A) {a}\n(B) {b}\n"


@settings
class Principle:
    """One principle, by the words of its three uses; a file may leave out all but `critic`."""

    critic: str
    revision: str = "Rewrite the response accordingly."
    comparison: str = "Please choose the response that is most helpful, honest, and harmless."
    name: str = ""


@settings
class Section:
    """Principles, and the forms in which a model is asked; by default the paper's, of flat text.

    `examples` stands before them: other conversations, criticized and revised in the same form.
    """

    principles: list[Principle]
    critique: str = _CRITIQUE
    revision: str = _CRITIQUE + " {critique}\n\nRevisionRequest: {revision}\n\nRevision:"
    alone: str = _TALK + "RevisionRequest: {revision}\n\nRevision:"
    comparison: str = _COMPARISON + "The answer, A or B, is:"
    letters: tuple[str, str] = ("A", "B")
    stop: tuple[str, ...] = ("\n\nRevisionRequest:", "\n\nHuman:")
    examples: str = ""

    def ask(self, form: str, principle: Principle, **slots: str) -> str:
        """One of the forms with its slots filled; what fills them is not looked through for slots."""
        words = {name: getattr(principle, name) for name in ("critic", "revision", "comparison")}
        return getattr(self, form).format(examples=self.examples, **words | slots)


Constitution = dict[str, Section]  # by language; one alone serves all


def load(source: str | Path = "tinytown") -> Constitution:
    """A constitution of `constitution.yaml` by its name, or a file, YAML or JSON: see `read`.

    Raises ValueError for what is no constitution, OSError for a file that is not there.
    """
    bundled = yaml.safe_load(FILE.read_text("utf-8"))
    found = bundled.get(str(source)) or yaml.safe_load(Path(source).expanduser().read_text("utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{source}: expected sections with principles, got {found!r:.80}")
    return read(found)


def read(found: dict[str, Any]) -> Constitution:
    """Sections by language, or one; or llm-swarm's form: `constitutions`, the words of each critique
    and revision, and `system_chat`, conversations that become examples."""
    if "constitutions" in found:
        names = ("Human", "Assistant", "CritiqueRequest", "Critique", "RevisionRequest", "Revision")
        talks = [zip(names, talk, strict=False) for talk in found.get("system_chat", ())]
        turns = [f"{name}: {turn['content'].strip()}\n\n" for talk in talks for name, turn in talk]
        found = {"principles": found["constitutions"], "examples": "".join(turns)}
    sections = {"any": found} if "principles" in found else found
    checked = TypeAdapter(Constitution).validate_json(json.dumps(sections))
    if not checked or not all(section.principles for section in checked.values()):
        raise ValueError(f"constitution: expected principles in each section of {[*sections]}")
    return checked


def section(constitution: Constitution, row: Row) -> Section:
    """That of the row's language, or the first."""
    return constitution.get(row.get("lang", "any")) or next(iter(constitution.values()))


class Revision(NamedTuple):
    """One round: the principle, what it was answered with, and the response that came of it."""

    principle: Principle
    critique: str  # empty where a revision was asked for without one
    response: str


def revise(
    rows: Sequence[Row],
    responses: Sequence[str],
    respond: Respond,
    constitution: Constitution,
    *,
    rounds: int = 4,
    critique: bool = True,
    seed: int = 0,
) -> list[list[Revision]]:
    """`rounds` revisions of each response, one after the other; without critiques, the ablation.

    Each round draws a principle for each row, the same ones with and without critiques. A revision
    that is empty leaves the response as it was.
    """
    rng, found = Random(f"principles-{seed}"), [list[Revision]() for _ in rows]
    parts, current = [section(constitution, row) for row in rows], list(responses)
    for _ in range(rounds):
        drawn = [rng.choice(part.principles) for part in parts]
        about = partial(_ask, respond, rows, parts, drawn, response=current)
        written = about("critique") if critique else [""] * len(rows)
        revised = about("revision", critique=written) if critique else about("alone")
        current = [new or old for new, old in zip(revised, current, strict=True)]
        for so_far, rule, why, text in zip(found, drawn, written, current, strict=True):
            so_far.append(Revision(rule, why, text))
    return found


def _ask(
    respond: Respond, rows: Any, parts: Any, drawn: Any, form: str, **columns: Sequence[str]
) -> list[str]:
    """What is answered to a form about each row, up to where its section says to stop."""
    asked = []
    for i, (row, part, principle) in enumerate(zip(rows, parts, drawn, strict=True)):
        slots = {name: values[i] for name, values in columns.items()}
        asked.append(part.ask(form, principle, prompt=prompt_text(row), **slots))
    ends = ("|".join(map(re.escape, part.stop)) or r"\Z" for part in parts)
    return [re.split(e, text)[0].strip() for e, text in zip(ends, respond(asked), strict=True)]


Letters = Callable[[list[str], list[tuple[str, str]]], Sequence[float]]


def letters_of_model(model: Any, tokenizer: Any, *, template: str = "auto") -> Letters:
    """P(first letter) against the second, after each prompt, from a model in this process.

    Read from the logits of the letters' first tokens. Raises ValueError where these are the same.
    """

    @torch.no_grad()
    def read(prompts: list[str], letters: list[tuple[str, str]], size: int = 32) -> list[float]:
        encoded = generate.encode_prompts(prompts, model, tokenizer, template, 1, "cut")
        both = [[tokenizer.encode(x, add_special_tokens=False)[0] for x in two] for two in letters]
        if any(a == b for a, b in both):
            raise ValueError(f"letters: expected two different first tokens, got {letters[:2]}")
        ids, found = [np.array([*prompt.ids, 0]) for prompt in encoded], list[float]()
        last = [(np.arange(len(each)) == len(each) - 1).astype(np.int64) for each in ids]
        with logprobs.evaluating(model), models.autocast(model):
            for start in range(0, len(ids), size):
                few = slice(start, start + size)
                batch = pack(list(map(Example, ids[few], last[few])), packing=False)
                batch = batch.to(model.device)
                logits = batch.in_order(logprobs.response_outputs(model, batch)[1])
                two = logits.gather(1, torch.tensor(both[few], device=logits.device))
                found += two.softmax(-1)[:, 0].tolist()
        return found

    return read


def letters_of_texts(respond: Respond) -> Letters:
    """P(first letter) from texts, of a server: 1, 0, or ½ where not exactly one letter is named."""

    def read(prompts: list[str], letters: list[tuple[str, str]]) -> list[float]:
        words = (re.findall(r"\w+", text) for text in respond(prompts))
        both = zip(words, letters, strict=True)
        return [0.5 + ((a.strip() in named) - (b.strip() in named)) / 2 for named, (a, b) in both]

    return read


def compare(
    rows: Sequence[Row],
    a: Sequence[str],
    b: Sequence[str],
    letters: Letters,
    constitution: Constitution,
    seed: int = 0,
) -> np.ndarray:
    """Probability that a[i] is better than b[i]: (n, 2), asked as the first, and as the second.

    The same principle, drawn for each row, in both orders. Their difference is position bias.
    """
    rng, asked, named = Random(f"comparisons-{seed}"), [], []
    for row, *both in zip(rows, a, b, strict=True):
        part = section(constitution, row)
        principle = rng.choice(part.principles)
        for first, second in (both, both[::-1]):
            slots = {"prompt": prompt_text(row), "a": first, "b": second}
            asked.append(part.ask("comparison", principle, **slots))
            named.append(part.letters)
    found = np.array(letters(asked, named), dtype=np.float64).reshape(-1, 2)
    return np.stack([found[:, 0], 1 - found[:, 1]], axis=1)


def soft_labels(both: np.ndarray, clamp: tuple[float, float] = (0.02, 0.98)) -> np.ndarray:
    """(n,) labels from `compare`'s (n, 2): the mean of the orders, within `clamp`.

    Bai et al. clamp to (0.4, 0.6) where the judge reasons first: it is then too sure of itself.
    """
    return both.mean(1).clip(*clamp)


def loss(margins: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy of P pairs, in nats: `margins` (P,) are log-odds, labels in [0, 1]."""
    return F.binary_cross_entropy_with_logits(margins.float(), labels)


def pair_loss(
    model: nn.Module, batch: PairBatch, config: dpo.DPOConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """DPO's `loss` with soft labels: what `training.fit` minimizes; metrics as DPO has them.

    The gradient vanishes where sigma(beta · h) is the label, so what the judge was not sure of
    stays apart by log(p / (1 - p)) / beta at most.
    """
    logps = logprobs.sum_by_example(logprobs.response_logps(model, batch), batch).view(-1, 2)
    assert batch.reference is not None
    rewards = config.beta * (logps - batch.reference)
    margins, seen = rewards[:, 0] - rewards[:, 1], rewards.detach()
    sure, better = batch.labels != 0.5, batch.labels > 0.5
    agrees = ((margins.detach() > 0) == better)[sure].float().mean() if sure.any() else sure.sum()
    metrics = {"accuracy": agrees, "margin": (seen[:, 0] - seen[:, 1]).mean()}
    return loss(margins, batch.labels), metrics


def encode(
    rows: Sequence[Row], tokenizer: Any, *, max_length: int = 256, template: str = "auto"
) -> list[Pair]:
    """Pairs of rows with `prompt`, `first`, `second` and `label`, the probability that first is better.

    Rows whose responses are empty or equal are left out, with a warning that counts them.
    """
    both = [(str(row["first"]).strip(), str(row["second"]).strip()) for row in rows]
    kept = [row for row, (a, b) in zip(rows, both, strict=True) if a and b and a != b]
    if len(kept) < len(rows):
        logger.warning("%d of %d pairs left out: empty or equal", len(rows) - len(kept), len(rows))
    named = [{"prompt": r["prompt"], "chosen": r["first"], "rejected": r["second"]} for r in kept]
    pairs = encode_pairs(named, tokenizer, max_length=max_length, template=template)
    if len(pairs) < len(kept):
        raise ValueError(f"max_length: cut to {max_length} tokens, some pairs are equal")
    return [p._replace(label=float(row["label"])) for p, row in zip(pairs, kept, strict=True)]


def train(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    config: dpo.DPOConfig | None = None,
    **options: Any,
) -> training.TrainResult:
    """DPO in place on rows as in `encode`; `options` and errors are those of `training.fit`.

    Of `config.variant` only "dpo" is there; the reference is `model` as it comes.
    """
    config = config or dpo.DPOConfig()
    if (config.variant, config.label_smoothing, config.nll) != ("dpo", 0, 0):
        expected = "variant dpo without label_smoothing and nll"
        raise ValueError(f"config: expected {expected}: labels are soft")
    limit = models.fitting(model, config.max_length)
    pairs = encode(rows, tokenizer, max_length=limit, template=config.template)
    pairs = dpo.with_reference(pairs, model)
    options |= dict(collate=pack_pairs, dropout=False)
    return training.fit(model, pairs, partial(pair_loss, config=config), config, **options)


def preference_model(
    model: Any, tokenizer: Any, rows: Sequence[Row], config: reward.RewardConfig, **options: Any
) -> reward.RewardModel:
    """A reward model, for PPO, learned from rows as in `encode`: `loss` of r_first - r_second."""
    limit = models.fitting(model, config.max_length)
    pairs = encode(rows, tokenizer, max_length=limit, template=config.template)
    scorer = reward.Scorer(reward.with_head(model, tokenizer, config.seed))

    def score(scorer: nn.Module, batch: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
        margins = torch.sub(*scorer(batch).view(-1, 2).unbind(1))
        right = ((margins > 0) == (batch.labels > 0.5)).float().mean()
        return loss(margins, batch.labels), {"accuracy": right.detach()}

    training.fit(scorer, pairs, score, config, collate=pack_pairs, **options)
    return reward.RewardModel(scorer.network, tokenizer, config.template, limit)
