"""RLOO and GRPO: a group of responses to one prompt is its own baseline, so no critic is needed.

    RLOO (Ahmadian et al. 2024)   A_i = r_i - mean of the other r_j of the group
    GRPO (Shao et al. 2024)       A_i = (r_i - mean of the group) / deviation of the group

Every token of a response gets its response's advantage. Both hold one set of weights less than
PPO with a critic of its own, and pay with K samples for each prompt. The arithmetic is here to be
read; the training is TRL's own, given what `techniques.ppo` is given. GRPO's loss is its paper's,
a mean over each response, not TRL's default over the batch. Left out: its other options.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal
from unittest import mock

import torch
from pydantic import Field
from torch import Tensor
from transformers import GenerationConfig, PrinterCallback

from labkit import models
from labkit.config import Count, Natural, NonNegative, Positive, settings
from labkit.generate import encode_prompts, eos_ids
from labkit.techniques.rollout import Reward, compute_rewards
from labkit.templates import Row

METHODS = ("rloo", "grpo")


@settings
class CriticFreeConfig:
    """Settings of a run, as in `ppo.PPOConfig`; a prompt has `generations` responses.

    RLOO has its KL penalty in the reward, GRPO in the loss; both weigh it by `beta`.
    """

    method: Literal["rloo", "grpo"] = "rloo"
    steps: Count = 50
    batch_size: Count = 128
    minibatch_size: Count = 32
    generations: Annotated[int, Field(ge=2)] = 4
    epochs: Count = 1
    learning_rate: Positive = 1e-4
    beta: NonNegative = 0.05
    missing_end_penalty: NonNegative = 1.0
    max_new_tokens: Count = 48
    template: Literal["auto", "chat", "alpaca", "alpaca_zh", "plain"] = "auto"
    seed: Natural = 0

    def __post_init__(self) -> None:
        if self.batch_size % self.minibatch_size or self.minibatch_size % self.generations:
            raise ValueError("expected generations to divide minibatch_size, and it batch_size")


def rloo_advantages(rewards: Tensor) -> Tensor:
    """r_i less the mean of the others in its group: rewards (prompts, K) → the same shape."""
    return rewards - (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)


def grpo_advantages(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """Standardized within each group (sample deviation plus `eps`, as in TRL): (prompts, K)."""
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True) + eps)


def train(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Row | str],
    reward: Reward,
    config: CriticFreeConfig | None = None,
) -> list[dict[str, float]]:
    """Trains `model` in place by TRL's trainer; returns metrics of each step.

    They are means over its responses: `reward`, without the penalty, `end_rate`, `length`, and
    `kl`, the sum of k1. The reference is `model` as it comes, adapters too. Prompts and reward: as
    in `ppo.train`.
    """
    import trl
    from datasets import Dataset

    config = config or CriticFreeConfig()
    models.check_tokenizer(tokenizer, None)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("model: expected weights that train, got only frozen ones")
    form, limit = config.template, config.max_new_tokens
    encoded = encode_prompts(prompts, model, tokenizer, form, limit, "left out")
    # A step needs all its prompts at once, or TRL ends before it begins.
    numbers = [*range(len(encoded))] * math.ceil(config.batch_size / len(encoded))
    columns = {"prompt": [encoded[i].text for i in numbers], "number": numbers}
    ids = {prompt.text: prompt.ids for prompt in encoded}  # the tokenizer alone may add a BOS
    ends = sorted(eos_ids(model, tokenizer, config.template))

    history: list[dict[str, float]] = []

    def score(
        prompts: list, completions: list[str], completion_ids: list, number: list[int], **_: Any
    ) -> list[float]:
        contents, rows = zip(*((encoded[i].content, encoded[i].row) for i in number), strict=True)
        rewards = compute_rewards(reward, contents, completions, rows)
        ended = [tokens[-1] in ends for tokens in completion_ids]
        seen = {"reward": fmean(rewards), "end_rate": fmean(ended)}
        seen["length"] = fmean(map(len, completion_ids))
        history.append({"step": len(history) + 1, **seen, "kl": math.nan})
        missing = [config.missing_end_penalty * (not end) for end in ended]
        return [r - m for r, m in zip(rewards, missing, strict=True)]

    method = config.method.upper()
    trainer, arguments = getattr(trl, f"{method}Trainer"), getattr(trl, f"{method}Config")
    pieces, on_cpu = config.batch_size // config.minibatch_size, model.device.type == "cpu"
    # TRL would load the reference from where the configuration says that the model came from.
    load_reference = f"{trainer.__module__}.create_model_from_path"
    with TemporaryDirectory() as folder, models.unchanged(model), models.no_progress_bar():
        models.base_model(model).generation_config = GenerationConfig(eos_token_id=ends)
        options = dict(report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1)
        options |= dict(use_cpu=on_cpu, dataloader_pin_memory=not on_cpu, seed=config.seed)
        options |= dict(bf16=models.autocast_dtype(model) is not None, disable_dropout=True)
        options |= dict(gradient_checkpointing=None, learning_rate=config.learning_rate)
        options |= dict(beta=config.beta, max_completion_length=config.max_new_tokens)
        options |= dict(per_device_train_batch_size=config.minibatch_size)
        options |= dict(steps_per_generation=pieces, num_generations=config.generations)
        options |= dict(max_steps=config.steps * pieces * config.epochs)
        options |= {"loss_type": "grpo"} if config.method == "grpo" else {}
        given = arguments(folder, num_iterations=config.epochs, **options)
        data = Dataset.from_dict(columns)
        with mock.patch(load_reference, lambda *place, **options: copy.deepcopy(model)):
            run = trainer(model, score, given, train_dataset=data, processing_class=tokenizer)
        run._tokenize_prompts = lambda texts: ([ids[text] for text in texts], None, {})
        run.remove_callback(PrinterCallback)
        generate = run._generate_and_score_completions

        def generate_and_note_kl(inputs: Any) -> Any:
            found, noted = generate(inputs), run._metrics["train"]
            if config.beta and config.method == "grpo":
                history[-1]["kl"] = _k1_of_grpo(run, found)
            elif config.beta:  # TRL's is a mean over tokens
                history[-1]["kl"] = noted["kl"][-1] * noted["completions/mean_length"][-1]
            return found

        run._generate_and_score_completions = generate_and_note_kl
        run.train()
    return history


@torch.no_grad()
def _k1_of_grpo(run: Any, found: dict[str, Any]) -> float:
    """TRL notes k3, of a step's first minibatch alone."""
    logp, mask = found.get("old_per_token_logps"), found["completion_mask"]
    if logp is None:  # a step of one update needs none
        ids, seen = (
            torch.cat([found[f"{part}_{kind}"] for part in ("prompt", "completion")], 1)
            for kind in ("ids", "mask")
        )
        logp = run._get_per_token_logps_and_entropies(run.model, ids, seen, mask.shape[1])[0]
    return ((logp - found["ref_per_token_logps"]) * mask).sum(1).mean().item()
