"""Preference pairs: rows → two encoded examples with one prompt → a packed batch.

What DPO and ORPO learn from. A ranking of K responses gives its K(K-1)/2 pairs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from labkit.batching import Batch, Example, pack
from labkit.formats import Located, Row, where
from labkit.templates import response

logger = logging.getLogger("labkit")


class Pair(NamedTuple):
    """Two responses to one prompt; `reference` (2,) are their log-probabilities under a reference
    model, the chosen one's first."""

    chosen: Example
    rejected: Example
    reference: np.ndarray | None = None


@dataclass
class PairBatch(Batch):
    """A batch of P pairs: examples 2i and 2i + 1 are the chosen and the rejected one of pair i.

    `reference` (P, 2) as in `Pair`; `prompts` (E,) are the lengths of the prompts.
    """

    reference: Tensor | None
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
    return PairBatch(**vars(batch), reference=reference, prompts=torch.tensor(prompts))


def best_first(row: Row) -> list[str]:
    """The texts of a ranking (`responses`, `ranks`, least = best) or of a pair, the best first.

    Raises ValueError for fewer than two, for ties, and for texts that are empty or equal.
    """
    if row.get("responses") is not None and row.get("ranks") is not None:
        given, ranks = list(row["responses"]), list(row["ranks"])
        whole = all(isinstance(rank, Integral) for rank in ranks)
        if len(ranks) != len(given) or not whole or len(set(ranks)) < len(ranks):
            raise ValueError(
                f"ranks: expected {len(given)} whole numbers without ties, one per response, got "
                f"{ranks}; decide ties, or leave a response out"
            )
        given = [given[i] for i in sorted(range(len(given)), key=ranks.__getitem__)]
    elif row.get("chosen") is not None and row.get("rejected") is not None:
        given = [row["chosen"], row["rejected"]]
    else:
        raise ValueError(f"expected responses and ranks, or chosen and rejected, got {sorted(row)}")
    texts = [response({"completion": text}) for text in given]
    if len(texts) < 2 or len(set(texts)) < len(texts) or not all(t.strip() for t in texts):
        raise ValueError(
            f"responses: expected two or more, none empty and no two equal, got {str(texts)[:200]}"
        )
    return texts


def encode_pairs(
    rows: Sequence[Row], tokenizer: Any, *, max_length: int = 512, template: str = "auto"
) -> list[Pair]:
    """The pairs of each row, encoded as by `data.encode`.

    Rows without a pair to learn from (a response empty, or equal to another, also once both are
    cut to `max_length`; no room for a response) are left out with a warning that counts and
    names them. Raises ValueError for rows that are no preferences, and where nothing is left.
    """
    singles, owners, left_out = [], [], {}
    for number, row in enumerate(rows, start=1):
        place = where(row, number)
        try:
            if row.get("prompt") is None:
                raise TypeError(f"expected a prompt, got the columns {sorted(row)}")
            texts = best_first(row)
        except ValueError as error:
            left_out[place] = str(error)
            continue
        for text in texts:
            single = Located(prompt=row["prompt"], completion=text)
            single.where = place
            singles.append(single)
            owners.append(place)
    ...
