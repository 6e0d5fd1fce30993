"""Supervised fine-tuning: TRL's trainer with settings that are fast for the machine at hand.

The loss is the mean negative log-likelihood of the response tokens,

    L = -1/N sum over response tokens t of log p(x_t | x_<t),

the same number as TRL's, computed for less: the hidden states of the N positions that
predict a response token are picked out before the output head, so neither prompts nor
padding cost logits. On a CPU short rows share a line, so that little is padded; no mask is
built for right padding, nothing is recomputed, and losses are read off the device once an entry
of the history (`batching`, `speed` and `progress`).
Preferences and rewards are not here; a technique changes the model before it comes here.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.training_args import OptimizerNames
from trl import SFTConfig, SFTTrainer

from labkit.batching import Collator, Rows, Shuffled
from labkit.models import autocast_dtype, context_length
from labkit.progress import Meter, Progress, check_finite
from labkit.speed import as_before, compiled, quicken_attention, response_loss

logger = logging.getLogger("labkit")

SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant_with_warmup",
}


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; the defaults suit a small model on a CPU.

    `batch_size` counts rows a step and device, `warmup_ratio` is a share of all steps,
    `max_steps` = -1 leaves the length to `epochs`. `precision`: "auto" (bfloat16 autocast
    where it pays), "bf16" or "fp32". `compile`: False, True, or "auto", which compiles the
    model once the rest of the run is seen to take longer than compiling saves. `packing` lets
    short rows of a batch share a line instead of padding each: True, False, or "auto", on a CPU
    where the model keeps such rows apart. A checkpoint is written every `save_steps` steps (0: never); `resume` names the folder of an earlier run's
    checkpoints, or a folder above it, and training goes on from the last whole one.
    """

    learning_rate: float = 1e-3
    epochs: float = 1.0
    max_steps: int = -1
    batch_size: int = 32
    gradient_accumulation: int = 1
    warmup_ratio: float = 0.1
    weight_decay: float = 0.01
    schedule: str = "cosine"
    max_grad_norm: float = 1.0
    seed: int = 0
    precision: str = "auto"
    optimizer: str = "adamw_torch_fused"
    gradient_checkpointing: bool = False
    compile: bool | str = False
    packing: bool | str = "auto"
    save_steps: int = 0
    resume: str = ""

    def __post_init__(self) -> None:
        at_least = {"batch_size": 1, "gradient_accumulation": 1, "weight_decay": 0}
        at_least |= {"max_grad_norm": 0, "seed": 0, "save_steps": 0}
        for name, least in at_least.items():
            _require(self, name, getattr(self, name) >= least, f"at least {least}")
        _require(self, "learning_rate", self.learning_rate > 0, "a rate above 0")
        _require(self, "epochs", self.epochs > 0, "a number above 0")
        _require(self, "max_steps", self.max_steps == -1 or self.max_steps > 0, "-1 or above 0")
        _require(self, "warmup_ratio", 0 <= self.warmup_ratio < 1, "a share from 0 to below 1")
        _require(self, "schedule", self.schedule in SCHEDULES, f"one of {list(SCHEDULES)}")
        precisions = ("auto", "bf16", "fp32")
        _require(self, "precision", self.precision in precisions, f"one of {precisions}")
        names = [name.value for name in OptimizerNames]
        _require(self, "optimizer", self.optimizer in names, f"one of {names}")
        known = self.compile in (False, True, "auto")
        _require(self, "compile", known, "False, True or 'auto'")
        known = self.packing in (False, True, "auto")
        _require(self, "packing", known, "False, True or 'auto'")


def _require(config: TrainConfig, name: str, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {getattr(config, name)!r}")


@dataclass(frozen=True)
class TrainResult:
    """What a run gave: `loss` is the last entry's of `history`, in nats a response token.

    `seconds`, `tokens` (without padding) and `tokens_per_second` count this call only, also
    after resuming; `peak_memory_bytes` is the device's on a GPU, the process's on a CPU.
    """

    history: list[dict] = field(repr=False)
    loss: float
    steps: int
    seconds: float
    tokens: int
    tokens_per_second: float
    peak_memory_bytes: int
    eval_loss: float | None = None


def sft(
    model,
    tokenizer,
    dataset,
    config: TrainConfig | None = None,
    *,
    eval_dataset=None,
    output_dir: str | Path | None = None,
    log: Callable[[dict, int], Any] | None = None,
    extra_loss: Callable[[Any], torch.Tensor] | None = None,
    progress: bool = True,
) -> TrainResult:
    """Trains `model` in place on the response tokens of `dataset`.

    `dataset` and `eval_dataset` hold `input_ids` and `completion_mask` (`data.encode`).
    `log(metrics, step)` is called for each entry of the history, `extra_loss(model)` gives a
    scalar that is added to the loss of each step but not reported in it. Raises ValueError
    for settings or rows that cannot work, before training, and FloatingPointError as soon as
    the loss is not finite; checkpoints in `output_dir` stay.
    """
    config = config or TrainConfig()
    rows = Rows(dataset)
    _check(model, tokenizer, rows, config, output_dir)
    checkpoint = _last_checkpoint(Path(config.resume)) if config.resume else None
    evaluated = None if eval_dataset is None else Rows(eval_dataset)
    with contextlib.ExitStack() as stack:
        folder = output_dir or stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(as_before(model))
        meter = Meter(log)
        trainer = FastSFTTrainer(model, tokenizer, dataset, rows, config, str(folder), meter)
        trainer.extra_loss = extra_loss
        shown = Progress(meter, progress)
        trainer.add_callback(shown)
        stack.callback(shown.close)
        stack.enter_context(compiled(trainer, config.compile))
        seconds = _train(trainer, checkpoint)
        eval_loss = None if evaluated is None else trainer.held_out_loss(evaluated)
    if log is not None and eval_loss is not None:
        log({"eval_loss": eval_loss}, trainer.state.global_step)
    return _result(trainer, meter, seconds, eval_loss)


def _train(trainer: FastSFTTrainer, checkpoint: str | None) -> float:
    if trainer.args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    return time.perf_counter() - start


def _result(
    trainer: FastSFTTrainer, meter: Meter, seconds: float, eval_loss: float | None
) -> TrainResult:
    if trainer.args.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return TrainResult(
        history=meter.history,
        loss=meter.history[-1]["loss"],
        steps=trainer.state.global_step,
        seconds=seconds,
        tokens=meter.tokens,
        tokens_per_second=meter.tokens / seconds,
        peak_memory_bytes=peak,
        eval_loss=eval_loss,
    )


class FastSFTTrainer(SFTTrainer):
    """TRL's trainer with the loss, the batches and the bookkeeping of this module."""

    def __init__(self, model, tokenizer, dataset, rows, config, folder, meter) -> None:
        super().__init__(
            model=model,
            args=_arguments(model, config, folder),
            train_dataset=dataset,
            processing_class=tokenizer,
            data_collator=Collator(tokenizer.pad_token_id),
        )
        self.train_dataset, self.config, self.meter = rows, config, meter
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the tokens of a step
        self.extra_loss: Callable[[Any], torch.Tensor] | None = None
        self.fused = self.args.device.type == "cuda" and not _soft_prompt(model)
        self._sum, self._tokens = 0.0, 0
        self.data_collator.packing = _packing(model, rows, config)
        # Several passes for one gradient are for a single process: DDP expects one.
        alone = self.args.use_cpu and self.accelerator.num_processes == 1
        self.data_collator.cut = alone and not self.data_collator.packing
        if self.args.bf16 and self.args.use_cpu:
            quicken_attention(model)
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        tokens = inputs.pop("tokens")
        targets = num_items_in_batch or len(inputs["shift_labels"])
        with self.accelerator.autocast():  # around all parts, so that weights are cast once
            loss = response_loss(model, inputs, self.fused) / targets
        if num_items_in_batch is not None:  # devices average what was divided by all tokens
            loss = loss * self.accelerator.num_processes
        self._sum, self._tokens = self._sum + loss.detach(), self._tokens + tokens
        if self.extra_loss is not None:
            loss = loss + self.extra_loss(self.model) / self.current_gradient_accumulation_steps
        if loss.device.type == "cpu":  # free here; elsewhere it would wait for the device
            check_finite(loss.item(), self.state.global_step + 1, self._get_learning_rate())
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        self.meter.add(self._sum, self._tokens, self._get_learning_rate())
        self._sum, self._tokens = 0.0, 0
        return grad_norm

    def _get_train_sampler(self, train_dataset=None):
        return Shuffled(len(self.train_dataset), self.config.seed)

    def _save_checkpoint(self, model, trial):
        entry = self.meter.flush(self.state.global_step)  # raises before a bad model is kept
        if entry:
            self.state.log_history.append(entry)
        Trainer._save_checkpoint(self, model, trial)

    def floating_point_ops(self, inputs) -> int:
        return 0  # counting walks over all parameters at each step

    @torch.no_grad()
    def held_out_loss(self, rows: Rows) -> float:
        """Mean negative log-likelihood a response token over `rows`, in nats."""
        self.model.eval()
        order = sorted(range(len(rows)), key=rows.lengths.__getitem__)
        total, count = 0.0, 0
        for start in range(0, len(order), self.config.batch_size):
            batch = [rows[row] for row in order[start : start + self.config.batch_size]]
            inputs = self._prepare_inputs(self.data_collator(batch))
            total += float(response_loss(self.model_wrapped, inputs, self.fused))
            count += len(inputs["shift_labels"])
        return total / count


def _arguments(model, config: TrainConfig, folder: str) -> SFTConfig:
    on_cpu = next(model.parameters()).device.type == "cpu"
    return SFTConfig(
        output_dir=folder,
        learning_rate=config.learning_rate,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        warmup_steps=config.warmup_ratio,
        weight_decay=config.weight_decay,
        lr_scheduler_type=SCHEDULES[config.schedule],
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        optim=config.optimizer,
        activation_checkpointing=config.gradient_checkpointing,
        bf16=_autocast(model, config.precision),
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 500,
        save_total_limit=2,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
    )


def _autocast(model, precision: str) -> bool:
    if precision == "auto":
        return autocast_dtype(model) is torch.bfloat16
    return precision == "bf16"


def _check(model, tokenizer, rows: Rows, config: TrainConfig, output_dir) -> None:
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ValueError(
            f"tokenizer: expected a pad token other than the end token, got pad "
            f"{tokenizer.pad_token!r} and end {tokenizer.eos_token!r}; models.load sets one"
        )
    if output_dir is None and config.save_steps:
        raise ValueError("save_steps: expected an output_dir to keep checkpoints in, got None")
    context = context_length(model)
    if context and rows.lengths.max() > context:
        raise ValueError(
            f"row {rows.lengths.argmax()}: expected at most {context} tokens, the model's "
            f"context, got {rows.lengths.max()}; encode with max_length={context} or less"
        )
    entries = model.get_input_embeddings().num_embeddings
    if rows.ids.max() >= entries:
        raise ValueError(
            f"dataset: expected token ids below {entries}, the model's embedding, got "
            f"{rows.ids.max()}; encode with the tokenizer that belongs to the model"
        )
    if config.compile and next(model.parameters()).device.type == "cpu" and not _compiler():
        raise ValueError("compile: expected a C++ compiler (g++) on the path, got none")
    if config.packing is True and not keeps_apart(model, rows):
        raise ValueError("packing: expected a model in which rows that share a line do not see each "
                         "other; this one mixes them, so leave packing off")  # fmt: skip


def _packing(model, rows: Rows, config: TrainConfig) -> bool:
    if config.packing != "auto":
        return bool(config.packing)
    return next(model.parameters()).device.type == "cpu" and keeps_apart(model, rows)


@torch.no_grad()
def keeps_apart(model, rows: Rows) -> bool:
    """Whether rows packed into a line have the loss that they have alone, tried on a few rows.

    A soft prompt stands before a line's first row only, and some architectures carry a state
    across position ids that begin anew.
    """
    if _soft_prompt(model):
        return False
    few = [rows[i] for i in np.argsort(rows.lengths, kind="stable")[:4]]
    device, training = next(model.parameters()).device, model.training
    model.eval()
    batches = [Collator(0, packing)(few) for packing in (True, False)]
    packed, alone = (
        response_loss(model, {k: torch.as_tensor(v, device=device) for k, v in batch.items()})
        for batch in batches
    )
    model.train(training)
    return torch.allclose(packed, alone, rtol=1e-4 if model.dtype == torch.float32 else 2e-2)


def _soft_prompt(model) -> bool:
    return getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def _last_checkpoint(folder: Path) -> str:
    """The newest checkpoint that was written to its end; a killed run may leave half a one."""
    found = [f for f in folder.glob("**/checkpoint-*") if f.name.rpartition("-")[2].isdigit()]
    for checkpoint in sorted(found, key=lambda f: -int(f.name.rpartition("-")[2])):
        with contextlib.suppress(OSError, json.JSONDecodeError):
            json.loads((checkpoint / "trainer_state.json").read_text())
            return str(checkpoint)
    raise FileNotFoundError(
        f"resume: expected a folder with a complete checkpoint, found none in {folder}; "
        "leave resume empty to start at step 0"
    )
