"""Instruction tuning: a model that completes text learns to do what it is asked (Wei et al. 2021).

    L = -1/N sum over response tokens t of log p(x_t | x_<t)

Prompt and response stand in one sequence, framed by a template. The loss counts the response
and its end token; the prompt is read, not learned, because whoever asks will write it. That is
all: what makes it *instruction* tuning is the data, many tasks in many phrasings. Left out:
packing and speed (`labkit.training` minimizes the same number), several turns (`labkit.data`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch

from labkit import data, evaluation
from labkit.templates import ALPACA, Row, response

LANGUAGES = ("en", "zh")


@dataclass(frozen=True)
class InstructionConfig:
    """What a row becomes before training.

    `template` is one of `data.TEMPLATES`, `max_length` counts tokens. The chapter's loop (5.5.2)
    is `learn_prompt=True, learn_end=False`: it learns to write questions too, and never to stop.
    """

    template: str = "auto"
    max_length: int = 256
    learn_prompt: bool = False
    learn_end: bool = True

    def __post_init__(self) -> None:
        if self.template not in data.TEMPLATES:
            expected = ", ".join(data.TEMPLATES)
            raise ValueError(f"template: expected one of {expected}, got {self.template!r}")
        if self.max_length < 2:
            raise ValueError(f"max_length: expected at least 2 tokens, got {self.max_length}")


def format_alpaca(instruction: str, given: str = "", language: str = "en") -> str:
    """The prompt of the chapter's template (5.4.2), up to where the response begins.

    The response is no part of it: appended and tokenized apart, it can be told from the prompt.
    """
    if language not in LANGUAGES:
        raise ValueError(f"language: expected one of {', '.join(LANGUAGES)}, got {language!r}")
    form = ALPACA[f"{language}_input" if given.strip() else language]
    return form.format(instruction=instruction, input=given)


def join(prompt_ids: Sequence[int], response_ids: Sequence[int], end: int) -> tuple[list, list]:
    """One example: the ids of prompt, response and end token, and its response mask (1 = loss)."""
    ids = [*prompt_ids, *response_ids, end]
    return ids, [0] * len(prompt_ids) + [1] * (len(response_ids) + 1)


def loss(
    logits: torch.Tensor, input_ids: torch.Tensor, response_mask: torch.Tensor
) -> tuple[torch.Tensor, dict[str, float]]:
    """Mean negative log-likelihood of the response tokens, in nats, and metrics.

    logits: (B, T, V); input_ids and response_mask: (B, T), mask 1 = keep. The logits at t predict
    the token at t + 1, so the first token of a sequence is never scored. Metrics: `perplexity`,
    `token_accuracy` (share of response tokens that are the most probable one), `tokens`.
    Raises ValueError for shapes that do not fit and for a batch without a response token.
    """
    if logits.shape[:2] != input_ids.shape or input_ids.shape != response_mask.shape:
        raise ValueError(
            "logits, input_ids, response_mask: expected (B, T, V), (B, T), (B, T), got "
            f"{tuple(logits.shape)}, {tuple(input_ids.shape)}, {tuple(response_mask.shape)}"
        )
    mask, targets = response_mask[:, 1:].bool(), input_ids[:, 1:]
    if not mask.any():
        raise ValueError("response_mask: expected a response token after the first position")
    logp = logits[:, :-1].float().log_softmax(-1)
    chosen = logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1)[mask]
    value = -chosen.mean()
    right = logp.argmax(-1)[mask] == targets[mask]
    metrics = {
        "perplexity": value.exp(),
        "token_accuracy": right.float().mean(),
        "tokens": mask.sum(),
    }
    return value, {name: metric.item() for name, metric in metrics.items()}


def encode(rows: list[Row], tokenizer: Any, config: InstructionConfig) -> data.Encoded:
    """Rows as ids and masks, by `data.encode`, then with the config's two switches applied."""
    encoded = data.encode(rows, tokenizer, max_length=config.max_length, template=config.template)
    if not config.learn_prompt and config.learn_end:
        return encoded
    import datasets

    ids, masks = list(encoded.dataset["input_ids"]), list(encoded.dataset["completion_mask"])
    if not config.learn_end:
        ids, masks = [i[:-1] for i in ids], [m[:-1] for m in masks]
    if config.learn_prompt:
        masks = [[1] * len(m) for m in masks]
    return data.Encoded(
        dataset=datasets.Dataset.from_dict({"input_ids": ids, "completion_mask": masks}),
        truncated=encoded.truncated, tokens=sum(map(len, ids)),
        response_tokens=sum(map(sum, masks)), max_length=encoded.max_length,
    )  # fmt: skip


def vary(
    rows: list[Row], count: int, *, languages: Iterable[str] | None = None,
    families: Iterable[str] | None = None, phrasings: int | None = None,
) -> list[Row]:  # fmt: skip
    """`count` rows of less variety: only these languages, families, or first phrasings of each.

    Rows that remain are repeated until there are `count`, so that arms of a comparison train for
    the same number of steps; fewer phrasings leave the mix of tasks and languages as it is. Needs
    Tinytown's `lang`, `task` and `phrasing` columns, the last of a training split.
    """
    languages, families = set(languages or ()), set(families or ())
    kept = [
        row for row in rows
        if (not languages or row["lang"] in languages) and (not families or row["task"] in families)
    ]  # fmt: skip
    groups = defaultdict(list)
    for row in kept:
        if phrasings is None or int(row["phrasing"].removeprefix("ask")) < phrasings:
            groups[row["task"], row["lang"]].append(row)
    mix = [group for row in kept if (group := (row["task"], row["lang"])) in groups]
    if not mix:
        raise ValueError("rows: expected some of these languages, families, phrasings, got none")
    turns = {group: cycle(members) for group, members in groups.items()}
    return [next(turns[mix[i % len(mix)]]) for i in range(count)]


def contains(row: Row, answer: str) -> bool:
    """A lenient mark: the right answer stands somewhere in `answer`, whatever surrounds it.

    Free forms (lists, stories) must be right as a whole.
    """
    if evaluation.score([row], [answer]).accuracy:
        return True
    if row.get("task") in ("listing", "story"):
        return False
    text, border = evaluation.normalize(answer), r"[a-z0-9]"
    return any(
        re.search(f"(?<!{border}){re.escape(evaluation.normalize(right))}(?!{border})", text)
        for right in row.get("accept", [response(row)])
    )


@torch.no_grad()
def end_probability(model: Any, encoded: data.Encoded) -> float:
    """Mean probability of the last token of each row (the end token) after the right answer."""
    was_training = model.training
    model.eval()
    device, total = next(model.parameters()).device, 0.0
    for ids in encoded.dataset["input_ids"]:
        logits = model(torch.tensor([ids[:-1]], device=device)).logits[0, -1]
        total += logits.float().softmax(-1)[ids[-1]].item()
    model.train(was_training)
    return total / len(encoded)
