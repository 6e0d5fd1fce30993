"""RLOO and GRPO: a group of responses to one prompt is its own baseline, so no critic is needed.

    RLOO (Ahmadian et al. 2024)   A_i = r_i - mean of the other r_j of the group
    GRPO (Shao et al. 2024)       A_i = (r_i - mean of the group) / deviation of the group

Every token of a response gets its response's advantage. Both hold one set of weights less than
PPO with a critic of its own, and pay with K samples for each prompt. The arithmetic is here to be
read; the training is TRL's own RLOOTrainer and GRPOTrainer, given what `techniques/ppo` is given.
Left out: everything of theirs that is not asked for here (servers, tools, other losses).
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from labkit import models, sampling
from labkit.rewards import Reward, ask
from labkit.templates import TEMPLATES, Row

METHODS = ("rloo", "grpo")


@dataclass(frozen=True)
class CriticFreeConfig:
    """Settings of a run; names mean what they mean in `techniques.ppo.PPOConfig`.

    A step takes `batch_size` / `generations` prompts, with `generations` responses each. RLOO
    has its KL penalty in the reward, GRPO in the loss; both weigh it by `beta`.
    """

    method: str = "rloo"
    steps: int = 50
    batch_size: int = 128
    minibatch_size: int = 32
    generations: int = 4
    epochs: int = 1
    learning_rate: float = 1e-4
    beta: float = 0.05
    max_new_tokens: int = 48
    template: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        _require("method", self.method, self.method in METHODS, f"one of {METHODS}")
        _require("template", self.template, self.template in TEMPLATES, f"one of {TEMPLATES}")
        for name in ("steps", "generations", "epochs", "max_new_tokens"):
            least = 2 if name == "generations" else 1
            _require(name, getattr(self, name), getattr(self, name) >= least, f"at least {least}")
        for whole, part in (("batch_size", "minibatch_size"), ("minibatch_size", "generations")):
            fits = getattr(self, whole) % getattr(self, part) == 0
            _require(part, getattr(self, part), fits, f"a divisor of {whole}")
        _require("learning_rate", self.learning_rate, self.learning_rate > 0, "a rate above 0")
        _require("beta", self.beta, self.beta >= 0, "a number from 0")


def _require(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def rloo_advantages(rewards: Tensor) -> Tensor:
    """r_i less the mean of the others in its group: rewards (prompts, K) → the same shape."""
    others = rewards.shape[1] - 1
    return rewards - (rewards.sum(1, keepdim=True) - rewards) / others


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
    """Trains `model` in place by TRL's trainer; returns `reward`, `length` and `kl` of each.

    `model` must have been loaded from a folder or hub id, which TRL loads again as the reference
    where `beta` is above 0. Prompts and reward are those of `ppo.train`, and fail as there.
    """
    import transformers
    import trl
    from datasets import Dataset

    config = config or CriticFreeConfig()
    models.check_tokenizer(tokenizer, None)
    asked = sampling.encode(prompts, model, tokenizer, config.template, config.max_new_tokens)
    begin = _begin(tokenizer)
    texts = [prompt.text.removeprefix(begin) for prompt in asked]
    # A step needs all its prompts at once, or TRL ends before it begins.
    numbers = list(range(len(asked))) * math.ceil(config.batch_size / len(asked))
    rows = Dataset.from_dict({"prompt": [texts[i] for i in numbers], "number": numbers})

    def score(prompts: list, completions: list[str], number: list[int], **_: Any) -> list[float]:
        known = [asked[i] for i in number]
        return ask(reward, [a.shown for a in known], completions, [a.row for a in known])

    kind = config.method.upper()
    trainer, settings = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")
    with tempfile.TemporaryDirectory() as scratch, models.no_progress_bar():
        arguments = settings(**_arguments(model, config, scratch))
        run = trainer(model=model, reward_funcs=score, args=arguments, train_dataset=rows,
                      processing_class=tokenizer)  # fmt: skip
        for callback in (transformers.PrinterCallback, transformers.ProgressCallback):
            run.remove_callback(callback)
        run.train()
    return _history(run.state.log_history)


def _begin(tokenizer: Any) -> str:
    """The begin token, where the tokenizer adds one: TRL lets it, and the template has it already."""
    ids = tokenizer("x")["input_ids"]
    return tokenizer.bos_token if tokenizer.bos_token_id in ids[:1] else ""


def _arguments(model: Any, config: CriticFreeConfig, folder: str) -> dict[str, Any]:
    pieces, on_cpu = config.batch_size // config.minibatch_size, model.device.type == "cpu"
    half = models.autocast_dtype(model) is not None
    return dict(
        output_dir=folder, use_cpu=on_cpu, bf16=half, report_to="none", save_strategy="no",
        per_device_train_batch_size=config.minibatch_size, steps_per_generation=pieces,
        num_generations=config.generations, num_iterations=config.epochs,
        max_steps=config.steps * pieces * config.epochs, learning_rate=config.learning_rate,
        lr_scheduler_type="linear", max_completion_length=config.max_new_tokens, beta=config.beta,
        seed=config.seed, gradient_checkpointing=False, disable_dropout=True, disable_tqdm=True,
        logging_steps=1, dataloader_pin_memory=not on_cpu,
    )  # fmt: skip


def _history(log: list[dict]) -> list[dict[str, float]]:
    """Of TRL's log, with an entry for each update, those that have a rollout's reward.

    Its KL is a mean over tokens; here it is per response, as in `ppo`.
    """
    seen = [entry for entry in log if "reward" in entry]
    return [
        {"step": i + 1, "reward": entry["reward"], "length": entry["completions/mean_length"],
         "kl": entry.get("kl", math.nan) * entry["completions/mean_length"]}
        for i, entry in enumerate(seen)
    ]  # fmt: skip
