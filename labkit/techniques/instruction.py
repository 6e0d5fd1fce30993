"""Instruction tuning: a model that completes text learns to follow instructions (Wei et al. 2021).

    L = -1/N sum over response tokens t of log p(x_t | x_<t)

Prompt and response form one sequence, framed by a template. The loss counts the response and its
EOS; the prompt is read, not learned, because users will write it. What makes it *instruction*
tuning is the data, many tasks in many phrasings. Left out: packing and speed (`training` minimizes
the same number), several turns (`data`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field

from labkit import batching, data, evaluation, logprobs, templates
from labkit.config import settings
from labkit.formats import Row


@settings
class InstructionConfig:
    """What a row becomes: `template` is one of `templates.TEMPLATES`, `max_length` counts tokens.

    The chapter's loop (5.5.2) is `learn_prompt=True, learn_eos=False`: it learns to write
    questions too, and never to stop.
    """

    template: Annotated[str, Field(pattern=f"^({'|'.join(templates.TEMPLATES)})$")] = "auto"
    max_length: Annotated[int, Field(ge=2)] = 256
    learn_prompt: bool = False
    learn_eos: bool = True


def loss(
    logits: torch.Tensor, input_ids: torch.Tensor, response_mask: torch.Tensor
) -> tuple[torch.Tensor, dict[str, float]]:
    """Mean negative log-likelihood of the response tokens, in nats, and metrics.

    logits (B, T, V), input_ids and response_mask (B, T), 1 = keep. The logits at t predict token
    t + 1, so the first is never scored. `token_accuracy`: the most probable token is right.
    """
    mask, targets = response_mask[:, 1:].bool(), input_ids[:, 1:]
    logp = logits[:, :-1].float().log_softmax(-1)
    value = -logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1)[mask].mean()
    accuracy = (logp.argmax(-1) == targets)[mask].float().mean().item()
    tokens = mask.sum().item()
    return value, {"perplexity": value.exp().item(), "token_accuracy": accuracy, "tokens": tokens}


def encode(rows: list[Row], tokenizer: Any, config: InstructionConfig) -> data.Encoded:
    """`data.encode`, then with the config's two switches applied."""
    encoded = data.encode(rows, tokenizer, max_length=config.max_length, template=config.template)
    stop, learned = None if config.learn_eos else -1, int(config.learn_prompt)
    examples = (batching.Example(ids[:stop], mask[:stop] | learned) for ids, mask in encoded)
    return data.Encoded(examples, encoded.truncated, encoded.max_length)


def vary(
    rows: list[Row],
    count: int,
    *,
    languages: Iterable[str] | None = None,
    families: Iterable[str] | None = None,
    phrasings: int | None = None,
) -> list[Row]:
    """`count` rows of less variety: only these languages, families, or first phrasings of each.

    Those are repeated up to `count`, so that compared conditions train for as many steps; fewer
    phrasings keep the mix of tasks and languages. Needs Tinytown's columns of a training split.
    """
    langs, tasks = set(languages or ()), set(families or ())
    kept = [r for r in rows if not langs or r["lang"] in langs if not tasks or r["task"] in tasks]
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
    """Lenient match: the right response is somewhere in `answer`; lists and stories must equal."""
    exact = bool(evaluation.score([row], [answer]).accuracy)
    if exact or row.get("task") in ("listing", "story"):
        return exact
    text, edge = evaluation.normalize(answer), r"[a-z0-9]"
    accepted = map(evaluation.normalize, row.get("accept", [templates.response(row)]))
    return any(re.search(f"(?<!{edge}){re.escape(right)}(?!{edge})", text) for right in accepted)


@torch.no_grad()
def end_probability(model: Any, encoded: Sequence[batching.Example]) -> float:
    """Mean probability of the last token of each example (the EOS) after the right response."""
    device = next(model.parameters()).device
    last = [batching.Example(ids, np.arange(len(ids)) // (len(ids) - 1)) for ids, _ in encoded]
    batches = (batching.pack([example], packing=False).to(device) for example in last)
    with logprobs.evaluating(model):
        logps = [logprobs.response_logps(model, batch) for batch in batches]
    return torch.cat(logps).exp().mean().item()
