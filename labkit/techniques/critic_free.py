"""RLOO and GRPO: a group of responses to one prompt is its own baseline, so no critic is needed.

    RLOO (Ahmadian et al. 2024)   A_i = r_i - mean of the other r_j of the group
    GRPO (Shao et al. 2024)       A_i = (r_i - mean of the group) / deviation of the group

Every token of a response gets its response's advantage. Both hold one set of weights less than
PPO with a critic of its own, and pay with K samples for each prompt. The arithmetic is here to be
read; the training is TRL's own, given what `techniques.ppo` is given. Left out: its other options.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal
from unittest import mock

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
    """Trains `model` in place by TRL's trainer; returns `reward`, `length` and `kl` of each step.

    The reference is `model` as it comes, adapters too. Prompts and reward: as in `ppo.train`.
    """
    import trl
    from datasets import Dataset

    config = config or CriticFreeConfig()
    models.check_tokenizer(tokenizer, None)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("model: expected weights that train, got only frozen ones")
    encoded = encode_prompts(prompts, model, tokenizer, config.template, config.max_new_tokens)
    # A step needs all its prompts at once, or TRL ends before it begins.
    numbers = [*range(len(encoded))] * math.ceil(config.batch_size / len(encoded))
    columns = {"prompt": [encoded[i].text for i in numbers], "number": numbers}
    ids = {prompt.text: prompt.ids for prompt in encoded}  # the tokenizer alone may add a BOS
    ends = sorted(eos_ids(model, tokenizer, config.template))

    def score(prompts: list, completions: list[str], number: list[int], **_: Any) -> list[float]:
        contents, rows = zip(*((encoded[i].content, encoded[i].row) for i in number), strict=True)
        return compute_rewards(reward, contents, completions, rows)

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
        given = arguments(folder, num_iterations=config.epochs, **options)
        data = Dataset.from_dict(columns)
        with mock.patch(load_reference, lambda *place, **options: copy.deepcopy(model)):
            run = trainer(model, score, given, train_dataset=data, processing_class=tokenizer)
        run._tokenize_prompts = lambda texts: ([ids[text] for text in texts], None, {})
        run.remove_callback(PrinterCallback)
        run.train()
    # TRL logs every update; those with a reward begin a step. Its KL is a mean over tokens.
    entries = [entry for entry in run.state.log_history if "reward" in entry]
    history = []
    for step, entry in enumerate(entries, start=1):
        length, kl = entry["completions/mean_length"], entry.get("kl", math.nan)
        history.append(dict(step=step, reward=entry["reward"], length=length, kl=kl * length))
    return history
