"""RLOO and GRPO: a group of responses to one prompt is its own baseline, so no critic is needed.

    RLOO (Ahmadian et al. 2024)   A_i = r_i - mean of the other r_j of the group
    GRPO (Shao et al. 2024)       A_i = (r_i - mean of the group) / deviation of the group

Every token of a response gets its response's advantage. Both hold one set of weights less than
PPO with a critic of its own, and pay with K samples for each prompt. The arithmetic is here to be
read; the training is TRL's own, given what `techniques.ppo` is given. Left out: its other options.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

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
        if self.batch_size % self.minibatch_size:
            raise ValueError(f"minibatch_size: expected a divisor of {self.batch_size}")
        if self.minibatch_size % self.generations:
            raise ValueError(f"generations: expected a divisor of {self.minibatch_size}")


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

    The reference is `model` as it comes. Prompts and reward are those of `ppo.train`.
    """
    import transformers
    import trl
    from datasets import Dataset

    config = config or CriticFreeConfig()
    models.check_tokenizer(tokenizer, None)
    encoded = encode_prompts(prompts, model, tokenizer, config.template, config.max_new_tokens)
    # TRL lets a tokenizer add its BOS, and the template has it already.
    bos = tokenizer.bos_token if tokenizer.bos_token_id in tokenizer("x")["input_ids"][:1] else ""
    # A step needs all its prompts at once, or TRL ends before it begins.
    numbers = [*range(len(encoded))] * math.ceil(config.batch_size / len(encoded))
    texts = [encoded[i].text.removeprefix(bos) for i in numbers]

    def score(prompts: list, completions: list[str], number: list[int], **_: Any) -> list[float]:
        known = [encoded[i] for i in number]
        rows = [prompt.row for prompt in known]
        return compute_rewards(reward, [prompt.content for prompt in known], completions, rows)

    trainer = getattr(trl, f"{config.method.upper()}Trainer")
    with TemporaryDirectory() as folder, models.unchanged(model), models.no_progress_bar():
        base = models.base_model(model)
        base.generation_config.eos_token_id = sorted(eos_ids(model, tokenizer, config.template))
        if config.beta and model is base:  # TRL loads the reference from where the config says
            model.save_pretrained(folder)
            model.config._name_or_path = folder
        run = trainer(
            model=model,
            reward_funcs=score,
            args=_arguments(model, config, folder),
            train_dataset=Dataset.from_dict({"prompt": texts, "number": numbers}),
            processing_class=tokenizer,
        )
        run.remove_callback(transformers.PrinterCallback)
        run.train()
    # TRL logs every update; those with a reward begin a step. Its KL is a mean over tokens.
    history: list[dict[str, float]] = []
    for entry in [entry for entry in run.state.log_history if "reward" in entry]:
        length, kl = entry["completions/mean_length"], entry.get("kl", math.nan)
        found = {"reward": entry["reward"], "length": length, "kl": kl * length}
        history.append({"step": len(history) + 1, **found})
    return history


def _arguments(model: Any, config: CriticFreeConfig, folder: str) -> Any:
    import trl

    pieces, on_cpu = config.batch_size // config.minibatch_size, model.device.type == "cpu"
    return getattr(trl, f"{config.method.upper()}Config")(
        output_dir=folder,
        use_cpu=on_cpu,
        bf16=models.autocast_dtype(model) is not None,
        report_to="none",
        save_strategy="no",
        per_device_train_batch_size=config.minibatch_size,
        steps_per_generation=pieces,
        num_generations=config.generations,
        num_iterations=config.epochs,
        max_steps=config.steps * pieces * config.epochs,
        learning_rate=config.learning_rate,
        max_completion_length=config.max_new_tokens,
        beta=config.beta,
        seed=config.seed,
        gradient_checkpointing=False,
        disable_dropout=True,
        disable_tqdm=True,
        logging_steps=1,
        dataloader_pin_memory=not on_cpu,
    )
