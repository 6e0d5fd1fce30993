"""Preference pairs: rows → two encoded examples with one prompt → a packed batch.

What DPO and ORPO learn from. A ranking of K responses gives its K(K-1)/2 pairs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from labkit import models, templates
from labkit.batching import Batch, Example, join, pack
from labkit.formats import Row, where

logger = logging.getLogger("labkit")


class Pair(NamedTuple):
    """Two responses to one prompt; `reference` (2,) are their log-probabilities under a reference
    model, the chosen one's first; `label` is the probability that this one is better, if in doubt.
    """

    chosen: Example
    rejected: Example
    reference: np.ndarray | None = None
    label: float = 1.0


@dataclass
class PairBatch(Batch):
    """A batch of P pairs: examples 2i and 2i + 1 are the chosen and the rejected one of pair i.

    `reference` (P, 2) and `labels` (P,) as in `Pair`; `prompts` (E,) are the prompts' lengths.
    """

    reference: Tensor | None
    labels: Tensor
    prompts: Tensor

    @property
    def weight(self) -> int:
        return self.size // 2

    @property
    def in_response(self) -> Tensor:
        """(N,) bool: which targets belong to a response; the others to a prompt that is learned."""
        place = self.positions + 1 - self.starts[self.example]
        return place >= self.prompts[self.example]


def pack_pairs(
    pairs: Sequence[Pair], packing: bool = True, learn_prompts: bool = False
) -> PairBatch:
    """A batch of pairs. With `learn_prompts`, those of the chosen responses are targets as well."""
    examples = [example for pair in pairs for example in (pair.chosen, pair.rejected)]
    prompts = [int(np.argmax(example.mask)) for example in examples]
    known = [pair.reference for pair in pairs if pair.reference is not None]
    if learn_prompts:
        examples[::2] = [Example(e.ids, np.ones_like(e.mask)) for e in examples[::2]]
    batch = pack(examples, packing)
    reference = torch.tensor(np.stack(known)) if len(known) == len(pairs) else None
    labels = torch.tensor([pair.label for pair in pairs])
    return PairBatch(
        **vars(batch), reference=reference, labels=labels, prompts=torch.tensor(prompts)
    )


def best_first(row: Row) -> list[str]:
    """The texts of a ranking (`responses`, `ranks`, least = best) or of a pair, the best first.

    Raises ValueError for fewer than two, for ties, and for texts that are empty or equal.
    """
    given, ranks = row.get("responses"), row.get("ranks")
    if given is None or ranks is None:
        given, ranks = (row.get("chosen"), row.get("rejected")), (1, 2)
    given, ranks = list(given), list(ranks)
    if None in given or row.get("prompt") is None:
        expected = "a prompt, and responses and ranks, or chosen and rejected"
        raise ValueError(f"expected {expected}, got {sorted(row)}")
    whole = all(isinstance(rank, Integral) for rank in ranks)
    if not whole or not len(given) == len(ranks) == len(set(ranks)):
        expected = f"{len(given)} whole numbers, one per response, without ties"
        raise ValueError(f"ranks: expected {expected}, got {ranks}")
    texts = [templates.response({"completion": given[i]}) for i in np.argsort(ranks)]
    if len(texts) < 2 or len(set(texts)) < len(texts) or not all(t.strip() for t in texts):
        expected = "two or more, none empty and no two equal"
        raise ValueError(f"responses: expected {expected}, got {str(texts)[:200]}")
    return texts


def encode_pairs(
    rows: Sequence[Row], tokenizer: Any, *, max_length: int = 512, template: str = "auto"
) -> list[Pair]:
    """The pairs of each row, of token ids and masks whose 1s are a response and its EOS.

    Too long ones lose the beginning of their common prompt (a BOS stays), so much that the longer
    response fits, then the end of a response. Left out, with a warning that counts and names them,
    are rows that hold no pair to learn from: a response empty, or equal to the other, also once
    both are cut. Raises ValueError where nothing is left.
    """
    models.check_tokenizer(tokenizer)
    limit, bos = min(max_length, tokenizer.model_max_length), tokenizer.bos_token_id
    render, rendered, sizes, left_out = templates.renderer(tokenizer, template), [], [], []
    for number, row in enumerate(rows, start=1):
        place = where(row, number)
        try:
            found = [render({"prompt": row["prompt"], "completion": t}) for t in best_first(row)]
            rendered += found
            sizes.append((place, len(found)))
        except ValueError as error:
            left_out.append(f"{place}: {error}")
    columns = zip(*rendered, strict=True) if rendered else ((), ())
    prompts, responses = (iter(templates.tokenize(texts, tokenizer)) for texts in columns)
    pairs: list[Pair] = []
    for place, size in sizes:
        both = [(next(prompts), next(responses)) for _ in range(size)]
        longest = max(len(response) for _, response in both)
        examples = [join(*texts, limit, bos, longest) for texts in both]
        new = [Pair(*two) for two in combinations(examples, 2)]
        differ = [pair for pair in new if not np.array_equal(pair.chosen.ids, pair.rejected.ids)]
        if len(differ) < len(new):
            left_out.append(f"{place}: cut to {limit} tokens, its responses are equal")
        pairs += differ
    if left_out:
        logger.warning("%d rows left out; the first: %s", len(left_out), left_out[0])
    if not pairs:
        raise ValueError(f"rows: no pair to learn from; {left_out[0] if left_out else 'no rows'}")
    return pairs
