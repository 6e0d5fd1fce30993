"""Reward model: a number for how good a response is, learned from rankings (Ouyang et al. 2022).

    L = -1/B sum over rankings of 1/C(K,2) sum over its pairs (w above l) of log sigma(r_w - r_l)

This is the model of Bradley and Terry (1952): w is preferred to l with probability
sigma(r_w - r_l). A ranking of K responses is one element of a batch, so that K forward passes
serve its K(K-1)/2 pairs; a pair (chosen, rejected) is a ranking of two. The tuned language
model gets a linear head of one output, read at the last real token, which is the response's end
token; the chapter (5.5.3) reads the last position, padding in all but the longest text. Only
differences are learned, so the head needs no bias, and mean 0 and deviation 1 are set afterwards
on reference samples. Left out: margins between ranks, adapters, a reward for each step.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from labkit import models, training
from labkit.batching import Shuffled, cuts
from labkit.evaluation import wilson
from labkit.logprobs import position_ids
from labkit.progress import Meter, Progress, check_finite
from labkit.speed import as_before, quicken_attention
from labkit.templates import TEMPLATES, Rendered, Row, renderer, response

logger = logging.getLogger("labkit")

PAIRS = ("all", "one")


@dataclass(frozen=True)
class RewardConfig:
    """How rankings are read and learned; the defaults suit a small model on a CPU.

    `pairs`: "all" of a ranking, or "one" random pair of each (drawn once, by `seed`), as if no
    more had been compared. `max_length`: longer texts lose their beginning. `batch_size` counts
    rankings a step and device. The other names mean what they mean in `training.TrainConfig`.
    """

    pairs: str = "all"
    template: str = "auto"
    max_length: int = 256
    learning_rate: float = 1e-3
    epochs: float = 1.0
    batch_size: int = 16
    gradient_accumulation: int = 1
    weight_decay: float = 0.01
    seed: int = 0
    precision: str = "auto"
    save_steps: int = 0
    resume: str = ""

    def __post_init__(self) -> None:
        _require("pairs", self.pairs, self.pairs in PAIRS, f"one of {', '.join(PAIRS)}")
        known = self.template in TEMPLATES
        _require("template", self.template, known, f"one of {', '.join(TEMPLATES)}")
        _require("max_length", self.max_length, self.max_length >= 2, "at least 2 tokens")
        self.training()  # checks the rest

    def training(self) -> training.TrainConfig:
        own = ("pairs", "template", "max_length")
        return training.TrainConfig(**{k: v for k, v in vars(self).items() if k not in own})


def _require(name: str, value: object, holds: object, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def loss(
    scores: Tensor, pairs: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """-sum of weight · log sigma(r_better - r_worse) over pairs, in nats, and metrics.

    `scores` (N,); `pairs` (P, 2): where in `scores` the better and the worse response stand;
    `weights` (P,), which add up to 1 (default: a mean). Metrics, weighted alike: `accuracy`, the
    share of pairs whose better response scores higher; `margin`, the mean of r_better - r_worse.
    They stay on the device, so that nothing has to wait for it.
    """
    _require("pairs", tuple(pairs.shape), pairs.shape[1:] == (2,) and len(pairs), "(P, 2)")
    margins = (scores[pairs[:, 0]] - scores[pairs[:, 1]]).float()
    if weights is None:
        weights = torch.full_like(margins, 1 / len(margins))
    value, seen = -(weights * F.logsigmoid(margins)).sum(), margins.detach()
    return value, {"accuracy": weights @ (seen > 0).float(), "margin": weights @ seen}


def last_token(attention_mask: Tensor) -> Tensor:
    """Position of the last real token of each row: (B, T), padded left or right → (B,)."""
    places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (attention_mask.bool() * places).argmax(-1)


class Scorer(nn.Module):
    """r(x, y): the head applied to what the backbone says at the last real token.

    `network` is a sequence classifier of transformers with one output. `input_ids` and
    `attention_mask` (B, T), padded left or right → (B,), float32.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.network.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids(attention_mask),
            use_cache=False,
        ).last_hidden_state
        rows = torch.arange(len(hidden), device=hidden.device)
        read = hidden[rows, last_token(attention_mask)]
        with torch.autocast(read.device.type, enabled=False):  # bfloat16 has steps of 1/128
            return F.linear(read.float(), self.network.score.weight.float()).squeeze(-1)

    def train(self, mode: bool = True) -> Scorer:
        """Stays in eval mode: with dropout, equal texts would differ in score."""
        return super().train(False)


def with_head(model: Any, tokenizer: Any, seed: int = 0) -> Any:
    """A float32 copy of a causal language model, with a reward head in place of the output head.

    The head starts normal with standard deviation 1/√(d+1), d the hidden size. The copy is
    transformers' own sequence classifier, so that it and TRL can load it, and train it.
    """
    if hasattr(model, "peft_config"):
        raise ValueError("model: expected one without adapters, got one that has them; merge "
                         "them first: model.merge_and_unload()")  # fmt: skip
    backbone, config = copy.deepcopy((model.base_model, model.config))  # they share the config
    config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
    with torch.device("meta"):  # a frame: its weights come from the model
        network = transformers.AutoModelForSequenceClassification.from_config(config)
    width = network.score.in_features
    head = nn.utils.skip_init(nn.Linear, width, 1, bias=False)  # draws nothing itself
    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(head.weight, std=1 / math.sqrt(width + 1), generator=generator)
    setattr(network, network.base_model_prefix, backbone)
    network.score = head.to(model.device)
    return network.float().requires_grad_(True).eval()


def best_first(row: Row) -> list[str]:
    """The texts of a ranking (`responses`, `ranks`, least = best) or of a pair, the best first.

    Raises ValueError for fewer than two, for ties, and for texts that are empty or equal.
    """
    if row.get("responses") is not None and row.get("ranks") is not None:
        given, ranks = list(row["responses"]), list(row["ranks"])
        _require("ranks", ranks, len(ranks) == len(given), f"{len(given)}, one a response")
        _require("ranks", ranks, all(isinstance(r, Integral) for r in ranks), "whole numbers")
        _require("ranks", ranks, len(set(ranks)) == len(ranks),
                 "no ties (decide them, or leave a response out)")  # fmt: skip
        given = [given[i] for i in sorted(range(len(given)), key=ranks.__getitem__)]
    elif row.get("chosen") is not None and row.get("rejected") is not None:
        given = [row["chosen"], row["rejected"]]
    else:
        _require("columns", sorted(row), False, "responses and ranks, or chosen and rejected")
    _require("responses", len(given), len(given) >= 2, "at least two to compare")
    texts = [response({"completion": text}) for text in given]
    for place, text in enumerate(texts, start=1):
        _require(f"response {place} of {len(texts)}, best first", text, text.strip(), "some text")
        first = texts.index(text) + 1
        _require(f"responses {first} and {place}, best first", text[:60], first == place,
                 "different texts")  # fmt: skip
    return texts


def check(rows: Sequence[Row], tokenizer: Any, template: str = "auto") -> None:
    """Raises ValueError, naming the row (from 1), for what cannot be learned from; see `best_first`."""
    _render(rows, tokenizer, template)


def _render(rows: Sequence[Row], tokenizer: Any, template: str) -> list[list[Rendered]]:
    """Each row's texts in the template, the best first. Errors name the row, counted from 1."""
    models.check_tokenizer(tokenizer, None)
    _require("rows", len(rows), len(rows), "at least one ranking or pair")
    render, rendered = renderer(tokenizer, template), []
    for number, row in enumerate(rows, start=1):
        try:
            _require("columns", sorted(row), row.get("prompt") is not None, "a prompt")
            texts = best_first(row)
            rendered.append([render({"prompt": row["prompt"], "completion": t}) for t in texts])
        except ValueError as error:
            raise ValueError(f"rows: row {number}: {error}") from error
    return rendered


def _tokenize(rendered: Sequence[Rendered], tokenizer: Any, limit: int) -> list[list[int]]:
    """Prompt and response apart, as when a policy samples; the end token is never cut off."""
    prompts = list(dict.fromkeys(prompt for prompt, _ in rendered))
    options: dict[str, Any] = {"add_special_tokens": False, "verbose": False}
    known = dict(zip(prompts, tokenizer(prompts, **options)["input_ids"], strict=True))
    endings = tokenizer([text for _, text in rendered], **options)["input_ids"]
    rows = [known[prompt] + ids for (prompt, _), ids in zip(rendered, endings, strict=True)]
    if cut := sum(len(row) > limit for row in rows):
        logger.warning("%d of %d texts have over %d tokens: beginning cut", cut, len(rows), limit)
    return [row[-limit:] for row in rows]


def _padded(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask (B, T), padded on the right."""
    ids = [torch.tensor(row) for row in rows]
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad_id), mask.long()


@dataclass(frozen=True)
class RewardModel:
    """A trained network with all that it takes to score texts: `model(prompts, responses)`.

    A reward is (score - mean) / std; see `normalized`. `prompts` are what the `prompt` column of
    rows holds, text or messages, before any template, which adds a response's end token, too.
    """

    network: Any
    tokenizer: Any
    template: str = "auto"
    max_length: int = 256
    mean: float = 0.0
    std: float = 1.0
    batch_size: int = 64

    def __call__(self, prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
        """The reward of each response, in order; an empty one has a reward, too."""
        return [(score - self.mean) / self.std for score in self.scores(prompts, responses)]

    def scores(self, prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
        """What the network says, not normalized: differences are log-odds, in nats."""
        render = renderer(self.tokenizer, self.template)
        both = zip(prompts, responses, strict=True)
        return self.score_rendered([render({"prompt": p, "completion": r}) for p, r in both])

    @torch.no_grad()
    def score_rendered(self, texts: Sequence[Rendered]) -> list[float]:
        """Scores of (prompt, response) in their template, as `templates.render` gives them."""
        if not texts:
            return []
        rows = _tokenize(texts, self.tokenizer, self.max_length)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        scorer, device = Scorer(self.network).eval(), self.network.device
        dtype, found = models.autocast_dtype(self.network), []
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            for start in range(0, len(order), self.batch_size):
                batch = [rows[i] for i in order[start : start + self.batch_size]]
                ids, mask = _padded(batch, self.tokenizer.pad_token_id)
                found.append(scorer(ids.to(device), mask.to(device)))
        values = torch.cat(found).tolist()  # the device is waited for here only
        return [value for _, value in sorted(zip(order, values, strict=True))]

    def normalized(self, prompts: Sequence[Any], responses: Sequence[str]) -> RewardModel:
        """The same model, with mean 0 and (population) standard deviation 1 on these samples.

        Take samples of the model that a policy starts from.
        """
        scores = np.array(self.scores(prompts, responses))
        differ = len(scores) > 1 and scores.std() > 1e-6
        _require("responses", scores[:5].tolist(), differ, "samples that differ in score")
        return replace(self, mean=float(scores.mean()), std=float(scores.std()))

    def save(self, folder: str | Path) -> Path:
        """Weights as safetensors, tokenizer and normalization as JSON; see `models.save`."""
        kept = ("template", "max_length", "mean", "std")
        self.network.config.reward = {name: getattr(self, name) for name in kept}
        return models.save(self.network, self.tokenizer, folder)

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu") -> RewardModel:
        """What `save` wrote. Raises FileNotFoundError or ValueError if that is not there."""
        if not (Path(folder) / "config.json").is_file():
            raise FileNotFoundError(f"folder: expected a saved reward model, found none: {folder}")
        classifier = transformers.AutoModelForSequenceClassification
        config = transformers.AutoConfig.from_pretrained(folder)
        settings: dict[str, Any] = getattr(config, "reward", {})
        _require("folder", str(folder), settings, "a model that RewardModel.save wrote")
        with models.no_progress_bar():
            network, info = classifier.from_pretrained(
                folder, use_safetensors=True, output_loading_info=True
            )
        _require("folder", sorted(info["missing_keys"]), not info["missing_keys"], "all weights")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        return cls(network.to(device).eval(), tokenizer, **settings)


@dataclass(frozen=True)
class Agreement:
    """How a reward model orders pairs: `margins` r_better - r_worse, in nats of log-odds.

    `rankings` counts the rows from which the pairs come.
    """

    margins: list[float]
    rankings: int

    @property
    def accuracy(self) -> float:
        """The share of pairs whose better response scores higher."""
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
        return -F.logsigmoid(torch.tensor(self.margins, dtype=torch.float64)).mean().item()

    def calibration(self, bins: int = 5) -> list[dict[str, float]]:
        """How sure the model was of the response that it preferred, and how often it was right.

        Bins of equal width over probabilities from 0.5 to 1, without the empty ones: `predicted`
        (mean probability), `observed` (share right), `low` and `high` (Wilson), `n` (pairs).
        """
        sure = torch.tensor(self.margins, dtype=torch.float64).abs().sigmoid().tolist()
        groups: dict[int, list[tuple[float, bool]]] = {}
        for p, margin in zip(sure, self.margins, strict=True):
            groups.setdefault(min(int((2 * p - 1) * bins), bins - 1), []).append((p, margin > 0))
        return [_reliability(groups[number]) for number in sorted(groups)]

    def calibration_error(self, bins: int = 5) -> float:
        """Mean of |observed - predicted| over the bins, each counted by its pairs."""
        found = self.calibration(bins)
        off = sum(abs(b["observed"] - b["predicted"]) * b["n"] for b in found)
        return off / len(self.margins)


def _reliability(cases: list[tuple[float, bool]]) -> dict[str, float]:
    right, n = sum(held for _, held in cases), len(cases)
    low, high = wilson(right, n)
    predicted = sum(p for p, _ in cases) / n
    return {"predicted": predicted, "observed": right / n, "low": low, "high": high, "n": n}


def evaluate(model: RewardModel, rows: Sequence[Row]) -> Agreement:
    """Scores each response once and compares all pairs of each ranking with its order."""
    rendered = _render(rows, model.tokenizer, model.template)
    scores = iter(model.score_rendered([text for ranking in rendered for text in ranking]))
    ranked = [[next(scores) for _ in ranking] for ranking in rendered]
    return Agreement([b - w for r in ranked for b, w in combinations(r, 2)], len(ranked))


def train(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    config: RewardConfig | None = None,
    *,
    output_dir: str | Path | None = None,
    log: Callable[[dict, int], Any] | None = None,
    progress: bool = True,
) -> tuple[RewardModel, training.TrainResult]:
    """Learns from rankings (`prompt`, `responses`, `ranks`) or pairs (`chosen`, `rejected`).

    `model` is a tuned causal model, of which a copy is trained, or a network with a reward head
    (`with_head`), trained in place. `log(metrics, step)` gets each entry of the history;
    `output_dir` keeps checkpoints. Raises ValueError before training, naming the row (from 1),
    and FloatingPointError as soon as the loss is not finite.
    """
    config = config or RewardConfig()
    keeps = output_dir or not config.save_steps
    _require("save_steps", config.save_steps, keeps, "an output_dir to keep checkpoints in")
    rendered = _render(rows, tokenizer, config.template)
    checkpoint = training._last_checkpoint(Path(config.resume)) if config.resume else None
    network = model if hasattr(model, "score") else with_head(model, tokenizer, config.seed)
    context = getattr(network.config, "max_position_embeddings", None) or config.max_length
    reward = RewardModel(network, tokenizer, config.template, min(config.max_length, context))
    examples = _examples(rendered, reward, config)
    with contextlib.ExitStack() as stack:
        folder = output_dir or stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(as_before(network))
        trainer = _Trainer(reward, examples, config, str(folder), meter := Meter(log))
        shown = Progress(meter, progress)
        trainer.add_callback(shown)
        stack.callback(shown.close)
        seconds = training._train(trainer, checkpoint)
    return reward, training._result(trainer, meter, seconds, None)


Example = list[list[int]]  # the token ids of a ranking's texts, the best first


def _examples(
    rendered: list[list[Rendered]], model: RewardModel, config: RewardConfig
) -> list[Example]:
    draw = random.Random(config.seed)
    if config.pairs == "one":
        rendered = [[r[i] for i in sorted(draw.sample(range(len(r)), 2))] for r in rendered]
    texts = [text for ranking in rendered for text in ranking]
    ids = iter(_tokenize(texts, model.tokenizer, model.max_length))
    return [[next(ids) for _ in ranking] for ranking in rendered]


class _Collator:
    """Rankings -> `parts` of texts, sorted by length and cut as in `batching`, and their pairs."""

    def __init__(self, pad_id: int, cut: bool = False) -> None:
        self.pad_id, self.cut = pad_id, cut

    def __call__(self, rankings: list[Example]) -> dict[str, Any]:
        texts = [ids for ranking in rankings for ids in ranking]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        ends = cuts(np.array([len(texts[i]) for i in order])) if self.cut else [len(order)]
        parts = [order[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]
        places, pairs, weights = iter(np.argsort(order).tolist()), [], []
        for ranking in rankings:
            new = list(combinations([next(places) for _ in ranking], 2))
            pairs += new
            weights += [1 / len(new) / len(rankings)] * len(new)
        return {
            "parts": [_padded([texts[i] for i in part], self.pad_id) for part in parts],
            "pairs": torch.tensor(pairs),
            "weights": torch.tensor(weights),
            "tokens": sum(map(len, texts)),
        }


class _Trainer(transformers.Trainer):
    """Transformers' trainer with the loss of this room and the habits of `labkit.training`."""

    def __init__(self, model: RewardModel, examples: list[Example], config: RewardConfig,
                 folder: str, meter: Meter) -> None:  # fmt: skip
        scorer, collator = Scorer(model.network), _Collator(model.tokenizer.pad_token_id)
        arguments = training._arguments(scorer, config.training(), folder)
        super().__init__(scorer, arguments, collator, examples)
        self.meter, self._sum, self._tokens = meter, 0.0, 0
        # Several passes for one gradient are for a single process: DDP expects one.
        collator.cut = self.args.use_cpu and self.accelerator.num_processes == 1
        if self.args.bf16 and self.args.use_cpu:
            quicken_attention(model.network)
        for callback in (transformers.PrinterCallback, transformers.ProgressCallback):
            self.remove_callback(callback)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with self.accelerator.autocast():  # around all parts, so that weights are cast once
            scores = torch.cat([model(ids, mask) for ids, mask in inputs["parts"]])
        value, _ = loss(scores, inputs["pairs"], inputs["weights"])
        self._sum += value.detach() / self.current_gradient_accumulation_steps
        self._tokens += inputs["tokens"]
        if value.device.type == "cpu":  # free here; elsewhere it would wait for the device
            check_finite(value.item(), self.state.global_step + 1, self._get_learning_rate())
        return value

    def _get_grad_norm(self, model, grad_norm=None):
        self.meter.add(self._sum, self._tokens, self._get_learning_rate())
        self._sum, self._tokens = 0.0, 0
        return grad_norm

    def _get_train_sampler(self, train_dataset=None):
        return Shuffled(len(self.train_dataset), self.args.seed)

    def _save_checkpoint(self, model, trial):
        entry = self.meter.flush(self.state.global_step)  # raises before a bad model is kept
        if entry:
            self.state.log_history.append(entry)
        super()._save_checkpoint(model, trial)

    def floating_point_ops(self, inputs) -> int:
        return 0  # counting walks over all parameters at each step
