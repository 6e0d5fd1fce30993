"""Measures a model: exact answers, perplexity on plain text, held-out loss, answers side by side.

Every score comes with its sample size, and shares with a Wilson interval: on a few hundred
examples the difference between two runs is often noise. Win rates, refusals and lm-eval tasks
belong here too, once there are models to compare by them.
"""

from __future__ import annotations

import html
import math
import statistics
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from . import models
from .templates import Row, prompt_text, renderer, response

Check = Callable[[Row, str], bool]


@dataclass(frozen=True)
class Evaluation:
    """What a model answered to rows, and which of the answers were right."""

    rows: list[Row]
    responses: list[str]
    correct: list[bool]

    @property
    def n(self) -> int:
        return len(self.rows)

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval of the accuracy."""
        return wilson(sum(self.correct), self.n)

    def by(self, key: str) -> dict[Any, tuple[float, int]]:
        """Accuracy and number of rows for each value of a column, such as `task` or `lang`."""
        groups: dict[Any, list[bool]] = defaultdict(list)
        for number, (row, right) in enumerate(zip(self.rows, self.correct, strict=True), start=1):
            if key not in row:
                raise ValueError(f"key: row {number} has no column {key!r}, only {', '.join(row)}")
            groups[row[key]].append(right)
        return {
            value: (sum(groups[value]) / len(groups[value]), len(groups[value]))
            for value in sorted(groups, key=str)
        }

    def samples(self, k: int = 5) -> list[dict[str, Any]]:
        """k rows spread evenly: prompt, expected, response, correct."""
        count = min(k, self.n)
        return [
            {
                "prompt": prompt_text(self.rows[i]),
                "expected": response(self.rows[i]),
                "response": self.responses[i],
                "correct": self.correct[i],
            }
            for i in (j * self.n // count for j in range(count))
        ]

    def __repr__(self) -> str:
        low, high = self.interval
        return f"{self.accuracy:.1%} of {self.n} (95 % interval {low:.1%} to {high:.1%})"


def exact(
    model: Any,
    tokenizer: Any,
    rows: list[Row],
    *,
    template: str = "auto",
    max_new_tokens: int = 32,
    batch_size: int = 128,
    check: Check | None = None,
) -> Evaluation:
    """Answers every row greedily and checks the answers.

    check: `check(row, response) -> bool`. Default: Tinytown's exact checker for its rows (those
    with `task` and `lang`), else equality with the completion up to case, spacing, Unicode form
    and a final full stop.
    """
    from .generate import generate

    if not rows:
        raise ValueError("rows: expected at least one row to evaluate on, got none")
    render_row = renderer(tokenizer, template)
    prompts = [render_row(row)[0] for row in rows]
    responses = generate(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    return score(rows, responses, check)


def score(rows: list[Row], responses: list[str], check: Check | None = None) -> Evaluation:
    """Checks answers that are already there; see `exact`."""
    check = check or _default_check
    pairs = zip(rows, responses, strict=True)
    return Evaluation(rows, list(responses), [bool(check(row, text)) for row, text in pairs])


def _default_check(row: Row, answer: str) -> bool:
    if "task" in row and "lang" in row:
        from .tinytown import check

        return check(row, answer)
    return normalize(answer) == normalize(response(row))


def normalize(text: str) -> str:
    """Lower case, one Unicode form, single spaces, no full stop at the end."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(text.split()).rstrip(".。 ")


def perplexity(
    model: Any, tokenizer: Any, texts: Sequence[str], *, max_length: int = 256, batch_size: int = 16
) -> float:
    """exp of the mean negative log-likelihood per token over plain texts.

    Long texts are cut into windows of `max_length` tokens that overlap in one, so every token but
    a text's first is predicted exactly once. Padding does not count.
    """
    if isinstance(texts, str) or not texts:
        raise ValueError("texts: expected a list of at least one text, got "
                         + ("a single text" if texts else "none"))  # fmt: skip
    max_length = min(max_length, models.context_length(model) or max_length)
    if max_length < 2:
        raise ValueError(f"max_length: expected at least 2 tokens, got {max_length}")
    windows = [
        ids[start : start + max_length]
        for ids in tokenizer(list(texts), verbose=False)["input_ids"]
        for start in range(0, max(len(ids) - 1, 0), max_length - 1)
    ]
    if not windows:
        raise ValueError("texts: expected texts of at least two tokens, got only shorter ones")
    masks = [[1] * len(ids) for ids in windows]
    return math.exp(_mean_nll(model, windows, masks, batch_size))


def perplexity_by(
    model: Any, tokenizer: Any, texts: Mapping[str, Sequence[str]], **options: int
) -> dict[str, float]:
    """Perplexity for each genre of `{genre: texts}`; options as for `perplexity`."""
    return {genre: perplexity(model, tokenizer, t, **options) for genre, t in texts.items()}


def held_out_loss(model: Any, dataset: Any, *, batch_size: int = 32) -> float:
    """Mean loss per response token (nats) over an encoded dataset: `Encoded.dataset`."""
    masks = list(dataset["completion_mask"])
    return _mean_nll(model, list(dataset["input_ids"]), masks, batch_size)


def _mean_nll(
    model: Any, sequences: list[list[int]], masks: list[list[int]], batch_size: int
) -> float:
    """Mean of −log p over the tokens whose mask is 1 and that have a token before them."""
    import torch

    from .logprobs import token_logps

    device = next(model.parameters()).device
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    total, count = 0.0, 0
    with _evaluating(model), torch.no_grad():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            ids = _padded([sequences[i] for i in chosen]).to(device)
            mask = _padded([masks[i] for i in chosen]).to(device)[:, 1:].bool()
            attention = _padded([[1] * len(sequences[i]) for i in chosen]).to(device)
            logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits
            logps = token_logps(logits, ids)
            total -= logps[mask].double().sum().item()
            count += int(mask.sum())
    if not count:
        raise ValueError("dataset: expected response tokens to score, got masks that are all zero")
    return total / count


def _padded(sequences: list[list[int]]) -> Any:
    """(B, T) int64, zeros on the right; the attention mask keeps them out of everything."""
    import torch

    tensors = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@dataclass(frozen=True)
class SideBySide:
    """A table of texts, shown as HTML (escaped) or plain text."""

    columns: tuple[str, ...]
    cells: Sequence[tuple[str, ...]]

    def _repr_html_(self) -> str:
        style = 'style="text-align:left;vertical-align:top;white-space:pre-wrap"'
        head = "".join(f"<th {style}>{html.escape(name)}</th>" for name in self.columns)
        body = "".join(
            "<tr>" + "".join(f"<td {style}>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self.cells
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def __repr__(self) -> str:
        width = max(map(len, self.columns))
        names = [f"{name:>{width}} | " for name in self.columns]
        blocks = (map("".join, zip(names, row, strict=True)) for row in self.cells)
        return "\n\n".join("\n".join(block) for block in blocks)


def side_by_side(
    rows: list[Row], before: Sequence[str], after: Sequence[str], n: int = 5
) -> SideBySide:
    """n rows, spread evenly: prompt, expected answer, answers before and after training."""
    if not len(rows) == len(before) == len(after):
        raise ValueError(
            f"before, after: expected one answer for each of {len(rows)} rows, got "
            f"{len(before)} and {len(after)}"
        )
    count = min(n, len(rows))
    chosen = [j * len(rows) // count for j in range(count)]
    cells = [(prompt_text(rows[i]), response(rows[i]), before[i], after[i]) for i in chosen]
    return SideBySide(("prompt", "expected", "before", "after"), cells)


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n − 1); the deviation of one value is 0."""
    if not values:
        raise ValueError("values: expected at least one number, got none")
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def wilson(k: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The score interval of a share k/n (Wilson 1927), 95 % by default; also right near 0 and 1."""
    if not 0 <= k <= n or n == 0:
        raise ValueError(f"k, n: expected 0 ≤ k ≤ n and n ≥ 1, got k = {k}, n = {n}")
    share, spread = k / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return max(0.0, centre - half), min(1.0, centre + half)
