"""Measures a model: exact answers, perplexity on plain text, held-out loss, answers side by side.

Every score comes with its sample size, and shares with a Wilson interval: on a few hundred
examples the difference between two runs is often noise. A claim over several seeds is decided by
a 95 % interval (`difference`, `ratio`, `t_interval`) and a threshold (`decide`), never by a mean.
"""

from __future__ import annotations

import itertools
import math
import statistics
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from . import models
from .batching import Batch, Example, pack
from .templates import Row, renderer, response

Check = Callable[[Row, str], bool]
Seeds = Sequence[str | Sequence[float]]  # of each seed a number per question, or marks: "10 1 0"
# Of Student's distribution, for the mean of 2 to 10 values.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


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

    @property
    def marked(self) -> list[str]:
        """The responses, each after a ✓ or a ✗."""
        both = zip(self.correct, self.responses, strict=True)
        return [f"{'✓' if right else '✗'} {text.lstrip()}" for right, text in both]

    def by(self, key: str) -> dict[Any, tuple[float, int]]:
        """Accuracy and number of rows for each value of a column, such as `task` or `lang`."""
        groups: dict[Any, list[bool]] = defaultdict(list)
        for row, right in zip(self.rows, self.correct, strict=True):
            groups[row[key]].append(right)
        found = sorted(groups.items(), key=lambda group: str(group[0]))
        return {value: (sum(right) / len(right), len(right)) for value, right in found}

    def __repr__(self) -> str:
        low, high = self.interval
        return f"{self.accuracy:.1%} of {self.n} (95% interval {low:.1%} to {high:.1%})"


def exact(
    model: Any,
    tokenizer: Any,
    rows: list[Row],
    *,
    template: str = "auto",
    max_new_tokens: int | None = None,
    batch_size: int = 128,
    check: Check | None = None,
) -> Evaluation:
    """Answers every row greedily and checks the answers.

    check: `check(row, response) -> bool`. Default: Tinytown's exact checker for its rows (those
    with `task` and `lang`), else equality with the completion up to case, spacing, Unicode form
    and a final full stop. max_new_tokens: by default as many as the longest right answer has.
    """
    from .generate import generate

    if not rows:
        raise ValueError("rows: expected at least one row to evaluate on, got none")
    if not max_new_tokens:
        right = [text for row in rows for text in (response(row), *row.get("accept", ()))]
        ids = tokenizer(right, add_special_tokens=False, verbose=False)["input_ids"]
        max_new_tokens = max(map(len, ids)) + 1  # for EOS
    prompts = [prompt for prompt, _ in map(renderer(tokenizer, template), rows)]
    options = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    return score(rows, generate(model, tokenizer, prompts, **options), check)


def score(rows: list[Row], responses: list[str], check: Check | None = None) -> Evaluation:
    """Checks answers that are already there; see `exact`."""
    pairs = zip(rows, responses, strict=True)
    correct = [bool((check or _default_check)(row, text)) for row, text in pairs]
    return Evaluation(rows, list(responses), correct)


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
        raise ValueError(f"texts: expected a list of at least one text, got {texts!r:.80}")
    max_length = models.fitting(model, max_length)
    windows = [
        np.array(ids[start : start + max_length])
        for ids in tokenizer(list(texts), verbose=False)["input_ids"]
        for start in range(0, max(len(ids) - 1, 0), max_length - 1)
    ]
    return math.exp(held_out_loss(model, [Example(w, w * 0 + 1) for w in windows], batch_size))


def perplexity_by(
    model: Any, tokenizer: Any, texts: Mapping[str, Sequence[str]], **options: int
) -> dict[str, float]:
    """Perplexity for each genre of `{genre: texts}`; options as for `perplexity`."""
    return {genre: perplexity(model, tokenizer, t, **options) for genre, t in texts.items()}


def held_out_loss(model: Any, examples: Sequence[Example], batch_size: int = 32) -> float:
    """Mean loss per response token, in nats, over encoded examples (`data.encode`)."""
    from .logprobs import response_logps
    from .training import mean_loss

    if not any(example.mask[1:].any() for example in examples):
        raise ValueError("examples, texts: expected a token to predict, got none")

    def nll(network: Any, batch: Batch) -> tuple[Any, dict]:
        return -response_logps(network, batch).double().mean(), {}

    return mean_loss(model, examples, nll, partial(pack, packing=False), batch_size)


class Spread(NamedTuple):
    """Mean and standard deviation over seeds; f"{found:.0%}" shows both."""

    mean: float
    std: float

    def __format__(self, form: str) -> str:
        std = f"{self.std:{form.replace('+', '')}}"
        return f"{self.mean:{form}}\u00a0±\u00a0{std}"  # not to be broken across lines


def mean_std(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation (n − 1); the deviation of one value is 0."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)


class Runs(list[dict[str, Any]]):
    """Runs of a recorded sweep; of one condition, one for each seed."""

    def where(self, **condition: Any) -> Runs:
        """Those with these values, in the order of their seeds."""
        found = (run for run in self if condition.items() <= run.items())
        return Runs(sorted(found, key=lambda run: run["seed"]))

    def of(self, result: str) -> list[Any]:
        """A result of each run that has it: a number, or a number per question."""
        return [run[result] for run in self if result in run]

    def spread(self, result: str) -> Spread:
        """Of a result over seeds, of one per question the means. Raises where no run has it."""
        return mean_std([float(np.mean(values)) for values in self.of(result)])

    def mean(self, result: str) -> float:
        return self.spread(result).mean


class Interval(NamedTuple):
    """An estimate and the ends of its 95 % interval; f"{found:.1%}" shows all three."""

    value: float
    low: float
    high: float

    def __format__(self, form: str) -> str:
        value, low, high = (format(number, form) for number in self)
        return f"{value} ({low} to {high})"


def t_interval(values: Sequence[float]) -> Interval | None:
    """The mean of one value per seed with its 95 % t-interval; None of fewer than two."""
    if len(values) < 2:
        return None
    mean, std = mean_std(values)
    half = T_QUANTILES[len(values) - 2] * std / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def difference(ours: Seeds, theirs: Seeds, shared: bool = False) -> Interval | None:
    """Mean of ours - theirs over seeds and questions, with its 95 % interval; None without seeds.

    A bootstrap, paired: seeds are drawn anew, and under each its questions, with all rows that ask
    one, for both sides at once. `shared`: all seeds have the same questions, so one draw serves
    them all. Seeds count equally. Of marks (a word for each question, a 0 or 1 for each row) it is
    a difference of accuracies. Drawing from three seeds understates how much seeds differ, by a
    factor of √(2/3). Raises ValueError where the two sides are not of the same questions.
    """
    return _bootstrap(np.subtract, ours, theirs, shared)


def ratio(ours: Seeds, theirs: Seeds, shared: bool = False) -> Interval | None:
    """Mean of ours over mean of theirs, as `difference`; not a number where theirs are all 0."""
    return _bootstrap(np.divide, ours, theirs, shared)


def _bootstrap(combine: Any, ours: Seeds, theirs: Seeds, shared: bool) -> Interval | None:
    if len(ours) != len(theirs):
        raise ValueError(f"ours, theirs: expected as many seeds, got {len(ours)}, {len(theirs)}")
    seeds = []
    for pair in zip(ours, theirs, strict=True):
        (a, rows), (b, same) = map(_by_question, pair)
        if not np.array_equal(rows, same):
            raise ValueError("ours, theirs: expected the same questions on both sides of a seed")
        seeds.append((np.stack([a, b]), rows))
    if not seeds:
        return None
    rng, several = np.random.default_rng(0), range(len(seeds))
    chosen = rng.integers(len(seeds), size=(2000, len(seeds)))
    columns = rng.integers(len(seeds[0][1]), size=(2000, len(seeds[0][1])))
    means = np.empty((2, *chosen.shape))
    for place, number in itertools.product(several, several):
        (sums, rows), here = seeds[number], chosen[:, place] == number
        own = rng.integers(len(rows), size=(here.sum(), len(rows)))
        some = columns[here] if shared else own
        means[:, here, place] = sums[:, some].sum(-1) / rows[some].sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = combine(*np.mean([sums.sum(1) / rows.sum() for sums, rows in seeds], 0))
        ends = np.percentile(combine(*means.mean(-1)), [2.5, 97.5])
    return Interval(*map(float, (value, *ends)))


def _by_question(seed: str | Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """For each question of a seed: the sum over its rows, and their number."""
    if isinstance(seed, str):
        words = seed.split()
        return np.array([word.count("1") for word in words]), np.array([*map(len, words)])
    return np.asarray(seed, dtype=float), np.ones(len(seed))


def decide(found: Interval | None, threshold: float = 0.0, at_most: bool = False) -> str:
    """The verdict on "at least `threshold`", or "at most", from an estimate and its interval.

    "undecided" where the interval contains the threshold or an end is no number.
    """
    if found is None:
        return "not measured here"
    above, below = found.low > threshold, found.high < threshold
    holds, fails = (below, above) if at_most else (above, below)
    return "holds" if holds else "does not hold here" if fails else "undecided"


def within(found: Interval | None, limit: float) -> str:
    """The verdict on "not further than `limit` from 0", as `decide`."""
    return together(decide(found, limit, at_most=True), decide(found, -limit))


def about(values: Sequence[float], of: float) -> str:
    """The verdict on "about `of`", half to twice, for exact values: "holds in part" if some are."""
    inside = [of / 2 <= value <= 2 * of for value in values]
    return "holds" if all(inside) else "holds in part" if any(inside) else "does not hold here"


def together(*verdicts: str) -> str:
    """The verdict on conditions that must all hold: the worst of theirs (`record.VERDICTS`)."""
    from .record import VERDICTS

    return max(verdicts, key=VERDICTS.index, default="not measured here")


def wilson(k: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The score interval of a share k/n (Wilson 1927), 95 % by default; also right near 0 and 1."""
    if not 0 <= k <= n or n == 0:
        raise ValueError(f"k, n: expected 0 ≤ k ≤ n and n ≥ 1, got k = {k}, n = {n}")
    share, spread = k / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Agreement:
    """How a reward model orders pairs: `margins` r_better - r_worse, in nats of log-odds.

    `rankings` counts the rows from which the pairs come.
    """

    margins: list[float]
    rankings: int

    @property
    def accuracy(self) -> float:
        """The fraction of pairs whose better response scores higher."""
        return sum(margin > 0 for margin in self.margins) / len(self.margins)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval, for as many cases as rankings: pairs of one are not independent."""
        return wilson(round(self.accuracy * self.rankings), self.rankings)

    @property
    def margin(self) -> float:
        return sum(self.margins) / len(self.margins)

    @property
    def loss(self) -> float:
        """Mean of -log sigma(margin) over all pairs, in nats; guessing has log 2."""
        return float(np.logaddexp(0, -np.array(self.margins)).mean())

    def calibration(self, bins: int = 5) -> list[dict[str, float]]:
        """How sure the model was of the response that it preferred, and how often it was right.

        Bins of equal width over probabilities from 0.5 to 1, without the empty ones: `predicted`
        (mean probability), `observed` (fraction right), `low` and `high` (Wilson), `n` (pairs).
        """
        margins, groups = np.array(self.margins), []
        sure = 1 / (1 + np.exp(-np.abs(margins)))
        number = np.minimum((2 * sure - 1) * bins, bins - 1).astype(int)
        for inside in (number == i for i in np.unique(number)):
            right, n = int((margins[inside] > 0).sum()), int(inside.sum())
            low, high = wilson(right, n)
            seen = {"predicted": float(sure[inside].mean()), "observed": right / n}
            groups.append(seen | {"low": low, "high": high, "n": n})
        return groups

    def calibration_error(self, bins: int = 5) -> float:
        """Mean of |observed - predicted| over the bins, each counted by its pairs."""
        off = (abs(b["observed"] - b["predicted"]) * b["n"] for b in self.calibration(bins))
        return sum(off) / len(self.margins)
