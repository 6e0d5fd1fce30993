"""Reward model: a number for how good a response is, learned from rankings (Ouyang et al. 2022).

    L = -1/B sum over rankings of 1/C(K,2) sum over its pairs (w above l) of log sigma(r_w - r_l)

w is preferred to l with probability sigma(r_w - r_l) (Bradley and Terry 1952). A ranking of K
responses is one element of a batch, so that K forward passes serve its K(K-1)/2 pairs; a pair
(chosen, rejected) is a ranking of two. The tuned model gets a linear head, read at the last real
token, the response's EOS; the chapter (5.5.3) reads the last position, often padding. Only
differences are learned, so the head needs no bias, and mean 0 and deviation 1 are set afterwards
on reference samples. Left out: margins between ranks, adapters, a reward for each step.
"""

from __future__ import annotations

import copy
import logging
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from pydantic import Field
from torch import Tensor, nn

from labkit import models, training
from labkit.batching import Batch, Example, pack
from labkit.config import Count, settings
from labkit.evaluation import Agreement
from labkit.formats import Row, where
from labkit.pairs import best_first as best_first
from labkit.templates import Rendered, renderer, tokenize

logger = logging.getLogger("labkit")


@settings
class RewardConfig(training.TrainConfig):
    """As in `training.TrainConfig`; `batch_size` counts rankings.

    `pairs`: "all" of a ranking, or "one" random pair of each (drawn once, by `seed`), as if no
    more had been compared. `max_length`: longer texts lose their beginning.
    """

    batch_size: Count = 16
    pairs: Literal["all", "one"] = "all"
    template: str = "auto"
    max_length: Annotated[int, Field(ge=2)] = 256


def loss(
    scores: Tensor, pairs: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """-sum of weight · log sigma(r_better - r_worse) over pairs, in nats; and metrics.

    `pairs` (P, 2) are the places of a better and a worse response in `scores` (N,); `weights`
    (P,) add up to 1 (default: a mean). Metrics, weighted alike: `accuracy`, the fraction of pairs
    whose better response scores higher; `margin`, the mean of r_better - r_worse.
    """
    better, worse = pairs.unbind(1)
    margins = (scores[better] - scores[worse]).float()
    if weights is None:
        weights = torch.full_like(margins, 1 / len(margins))
    value, seen = -(weights * F.logsigmoid(margins)).sum(), margins.detach()
    return value, {"accuracy": weights @ (seen > 0).float(), "margin": weights @ seen}


@dataclass
class RankedBatch(Batch):
    """A batch of the texts of rankings: `pairs` (P, 2) of examples, better and worse, and their
    `pair_weights` (P,), which give each ranking the same weight."""

    pairs: Tensor
    pair_weights: Tensor
    rankings: int

    @property
    def weight(self) -> int:
        return self.rankings


def pack_rankings(rankings: Sequence[list[Example]], packing: bool = True) -> RankedBatch:
    """A batch of rankings, each the examples of its texts, the best first."""
    batch = pack([example for ranking in rankings for example in ranking], packing)
    numbers, pairs, weights = iter(range(batch.size)), [], []
    for ranking in rankings:
        new = list(combinations([next(numbers) for _ in ranking], 2))
        pairs += new
        weights += [1 / len(new) / len(rankings)] * len(new)
    tensors = {"pairs": torch.tensor(pairs), "pair_weights": torch.tensor(weights)}
    return RankedBatch(**vars(batch), **tensors, rankings=len(rankings))


class Scorer(nn.Module):
    """r(x, y): the head applied to what the backbone says at the last real token.

    `network` is a sequence classifier of transformers with one output and no adapters. A batch
    of E examples → (E,), float32.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        if hasattr(network, "peft_config") or network.config.num_labels != 1:
            raise ValueError("model: expected one output and no adapters: merge_and_unload() them")
        self.network, self.config = network, network.config

    def get_base_model(self) -> Any:
        return self.network

    def forward(self, batch: Batch) -> Tensor:
        inputs = {"input_ids": batch.input_ids, "use_cache": False}
        if batch.position_ids is not None:
            inputs["position_ids"] = batch.position_ids
        hidden = self.network.base_model(**inputs).last_hidden_state
        read = hidden.flatten(0, 1)[batch.ends]
        with torch.autocast(read.device.type, enabled=False):  # bfloat16 has steps of 1/128
            return F.linear(read.float(), self.network.score.weight.float()).squeeze(-1)

    def train(self, mode: bool = True) -> Scorer:
        """Stays in eval mode: with dropout, equal texts would differ in score."""
        return super().train(False)


def ranking_loss(scorer: nn.Module, batch: RankedBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """`loss` of what a `Scorer` gives for a batch: what `training.fit` minimizes."""
    return loss(scorer(batch), batch.pairs, batch.pair_weights)


def with_head(model: Any, tokenizer: Any, seed: int = 0) -> Any:
    """A float32 copy of a causal language model, with a reward head in place of the output head.

    The head starts normal with standard deviation 1/√(d+1), d the hidden size. It is transformers'
    own sequence classifier, so that it and TRL can load it, and train it; ValueError without one.
    """
    if hasattr(model, "peft_config"):
        raise ValueError("model: expected no adapters; merge them first: model.merge_and_unload()")
    backbone, config = copy.deepcopy((model.base_model, model.config))  # they share the config
    config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
    try:
        with torch.device("meta"):  # a frame: its weights come from the model
            network = transformers.AutoModelForSequenceClassification.from_config(config)
        width = network.score.in_features
    except (ValueError, AttributeError) as error:  # names a hundred classes, or the head `score`
        kind = config.model_type
        raise ValueError(f"model: transformers has no reward head for a {kind}") from error
    head = nn.utils.skip_init(nn.Linear, width, 1, bias=False)  # draws nothing itself
    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(head.weight, std=1 / math.sqrt(width + 1), generator=generator)
    setattr(network, network.base_model_prefix, backbone)
    network.score = head.to(model.device)
    return network.float().requires_grad_(True).eval()


def check(rows: Sequence[Row], tokenizer: Any, template: str = "auto") -> list[list[Rendered]]:
    """Each row's texts in the template, the best first, as (prompt, response).

    Raises ValueError, naming the row (from 1), for what cannot be learned from; see `best_first`.
    """
    models.check_tokenizer(tokenizer, None)
    if not len(rows):
        raise ValueError("rows: expected at least one ranking or pair, got none")
    render, rendered = renderer(tokenizer, template), []
    for number, row in enumerate(rows, start=1):
        try:
            texts = best_first(row)
            rendered.append([render({"prompt": row["prompt"], "completion": t}) for t in texts])
        except ValueError as error:
            raise ValueError(f"{where(row, number)}: {error}") from error
    return rendered


@dataclass(frozen=True)
class RewardModel:
    """A network with all that it takes to score texts: `model(prompts, responses)`.

    A reward is (score - mean) / std; see `normalized`. Prompts are text or messages, without the
    template, which adds a response's EOS, too.
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
        render, both = renderer(self.tokenizer, self.template), zip(prompts, responses, strict=True)
        return self._scores(self._encode([render({"prompt": p, "completion": r}) for p, r in both]))

    def _encode(self, rendered: Sequence[Rendered]) -> list[Example]:
        """Prompt and response tokenized apart, as when a policy samples; EOS is never cut off."""
        texts, limit = [text for both in rendered for text in both], self.max_length
        encoded = tokenize(texts, self.tokenizer)
        examples, cut = [], 0
        for prompt, reply in zip(encoded[::2], encoded[1::2], strict=True):
            ids = prompt + reply
            if len(ids) > limit:
                begin = ids[:1] if ids[0] == self.tokenizer.bos_token_id else []
                ids, cut = begin + ids[len(begin) - limit :], cut + 1
            mask = np.arange(len(ids)) >= len(ids) - len(reply)
            examples.append(Example(np.array(ids), mask.astype(np.int64)))
        if cut:
            logger.warning("%d texts have over %d tokens: beginning cut", cut, limit)
        return examples

    def _rankings(self, rendered: Sequence[Sequence[Rendered]]) -> list[list[Example]]:
        """The examples of each ranking; of texts that are equal once they are cut, only the best."""
        encoded = iter(self._encode([text for ranking in rendered for text in ranking]))
        rankings = [[next(encoded) for _ in ranking] for ranking in rendered]
        unique = [list({e.ids.tobytes(): e for e in reversed(r)}.values())[::-1] for r in rankings]
        kept = [ranking for ranking in unique if len(ranking) > 1]
        if lost := sum(map(len, rankings)) - sum(map(len, kept)):
            logger.warning("%d texts left out: once cut, they equal others of their ranking", lost)
        if not kept:
            raise ValueError("max_length: once cut, the texts of each ranking are equal")
        return kept

    @torch.no_grad()
    def _scores(self, examples: Sequence[Example]) -> list[float]:
        order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
        scorer, device, found = Scorer(self.network).eval(), self.network.device, []
        with models.autocast(self.network):
            for start in range(0, len(order), self.batch_size):
                chosen = [examples[i] for i in order[start : start + self.batch_size]]
                found.append(scorer(pack(chosen, packing=False).to(device)))
        values = torch.cat(found).tolist() if found else []  # the device is waited for here only
        return [value for _, value in sorted(zip(order, values, strict=True))]

    def normalized(self, prompts: Sequence[Any], responses: Sequence[str]) -> RewardModel:
        """The same model, with mean 0 and deviation 1 on samples of what a policy starts from."""
        scores = np.array(self.scores(prompts, responses))
        if len(scores) < 2 or scores.std() <= 1e-6:
            raise ValueError(f"responses: expected samples that differ in score, got {scores[:5]}")
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
        read = transformers.AutoModelForSequenceClassification.from_pretrained
        with models.no_progress_bar():
            network, info = read(folder, use_safetensors=True, output_loading_info=True)
        saved, missing = getattr(network.config, "reward", None), sorted(info["missing_keys"])
        if missing or not saved:
            raise ValueError(f"folder: not of RewardModel.save: {folder}; missing {missing}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        return cls(network.to(device).eval(), tokenizer, **saved)


def evaluate(model: RewardModel, rows: Sequence[Row]) -> Agreement:
    """Scores each response once and compares all pairs of each ranking with its order.

    Texts that are equal once they are cut count no more than in training.
    """
    rankings = model._rankings(check(rows, model.tokenizer, model.template))
    scores = iter(model._scores([example for ranking in rankings for example in ranking]))
    ranked = [[next(scores) for _ in ranking] for ranking in rankings]
    return Agreement([b - w for r in ranked for b, w in combinations(r, 2)], len(ranked))


def train(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    config: RewardConfig | None = None,
    **options: Any,
) -> tuple[RewardModel, training.TrainResult]:
    """Learns from rankings (`prompt`, `responses`, `ranks`) or pairs (`chosen`, `rejected`).

    `model` is a tuned causal model, of which a copy is trained, or a network with a reward head
    (`with_head`), trained in place. What is raised and `options` (`output_dir`, `log`, `progress`,
    `label`, `again`) are as in `training.fit`.
    """
    config = config or RewardConfig()
    rendered = check(rows, tokenizer, config.template)
    network = model if hasattr(model, "score") else with_head(model, tokenizer, config.seed)
    limit = models.fitting(network, config.max_length)
    reward, scorer = RewardModel(network, tokenizer, config.template, limit), Scorer(network)
    if config.pairs == "one":
        draw = random.Random(config.seed)
        rendered = [[r[i] for i in sorted(draw.sample(range(len(r)), 2))] for r in rendered]
    examples, options = reward._rankings(rendered), options | {"collate": pack_rankings}
    return reward, training.fit(scorer, examples, ranking_loss, config, **options)
