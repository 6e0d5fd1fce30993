"""One trainer for every loss: transformers' Trainer, fast on the machine at hand.

A technique gives a `Loss`, a function of a model and a batch, and `fit` minimizes it. The loss of
supervised fine-tuning is here, the mean negative log-likelihood of the response tokens,

    L = -1/N sum over response tokens t of log p(x_t | x_<t),

the same number as TRL's, computed for less: only response tokens enter the output head
(`logprobs`), short examples share a packed sequence (`batching`), and the history is read
off the device once an entry. What a technique changes in the model, it changes before.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal
from weakref import WeakKeyDictionary

import torch
from pydantic import AfterValidator
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer
from transformers import TrainingArguments as Arguments
from transformers.training_args import OptimizerNames

from labkit import checkpoints, logprobs, models
from labkit.batching import Batch, Shuffled, flat, pack
from labkit.config import Count, Natural, NonNegative, Positive, Share, settings
from labkit.progress import SMOOTH, STOPPED, History, Live, cell, check_finite
from labkit.record import peak_memory
from labkit.state import unchanged

Loss = Callable[[nn.Module, Any], tuple[Tensor, dict[str, Tensor]]]
FREE = ("save_steps", "resume", "compile")  # may change when a run is resumed
SAME_NAME = ("learning_rate", "max_steps", "weight_decay", "max_grad_norm", "seed")
_trained: WeakKeyDictionary[nn.Module, dict[str, int]] = WeakKeyDictionary()  # by which cells
logger = logging.getLogger("labkit")
# Old checkpoints are found by their numbers, whatever the times of their files.
logging.getLogger("transformers.trainer_utils").addFilter(
    lambda record: "mtime may not be reliable" not in record.getMessage()
)
Optimizer = Annotated[str, AfterValidator(lambda name: OptimizerNames(name).value)]


@settings
class TrainConfig:
    """Settings of a training run; the defaults suit a small model on a CPU.

    `batch_size` counts examples per step and device, `warmup_ratio` is a share of all steps,
    `max_steps` = -1 leaves the length to `epochs`. `precision` "auto" is bfloat16 autocast where
    it pays. With `packing`, short examples of a batch share a sequence; "auto": where the model
    keeps them apart. A checkpoint is written every `save_steps` steps (0: never); `resume`
    names a folder with checkpoints in or below it, and the newest complete one is gone on from.
    """

    learning_rate: Positive = 1e-3
    epochs: Positive = 1.0
    max_steps: Literal[-1] | Count = -1
    batch_size: Count = 32
    gradient_accumulation: Count = 1
    warmup_ratio: Share = 0.1
    weight_decay: NonNegative = 0.01
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    max_grad_norm: NonNegative = 1.0
    seed: Natural = 0
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    optimizer: Optimizer = "adamw_torch_fused"
    gradient_checkpointing: bool = False
    compile: bool = False
    packing: bool | Literal["auto"] = "auto"
    save_steps: Natural = 0
    resume: str = ""


@dataclass(frozen=True)
class TrainResult:
    """What a run gave: `loss` is that of the last entry of `history`.

    `seconds`, `tokens` (without padding) and `tokens_per_second` count this call only, also
    after resuming; `peak_memory_bytes` is the device's on a GPU, the process's on a CPU. `stopped`
    says at which step, if the reader of a notebook stopped it.
    """

    history: list[dict] = field(repr=False)
    loss: float
    steps: int
    seconds: float
    tokens: int
    tokens_per_second: float
    peak_memory_bytes: int
    eval_loss: float | None = None
    stopped: str = ""


def sft_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean of -log p over the response tokens of a batch, in nats.

    A mixture of experts adds its router's auxiliary loss, weighted as its configuration says.
    """
    coefficient = logprobs.router_coefficient(model)
    options = {"output_router_logits": True} if coefficient else {}
    _, output = logprobs.forward(model, batch, **options)
    loss = -logprobs.token_logps(output, batch)[1].mean()
    if not coefficient:
        return loss, {}
    balance = logprobs.router_loss(model, output, batch)
    return loss + coefficient * balance, {"nll": loss.detach(), "router_loss": balance.detach()}


def fit(
    model: nn.Module,
    examples: Sequence[Any],
    loss: Loss,
    config: TrainConfig | None = None,
    *,
    collate: Callable[..., Any] = pack,
    eval_examples: Sequence[Any] | None = None,
    output_dir: str | Path | None = None,
    log: Callable[[dict, int], Any] | None = None,
    extra_loss: Callable[[nn.Module], Tensor] | None = None,
    progress: bool = True,
    label: str = "",
    again: bool = False,
    dropout: bool = True,
) -> TrainResult:
    """Trains `model` in place: minimizes the mean of `loss` over `examples`.

    `collate(examples, packing=…)` makes batches, whose `weight` says how many terms their loss is
    a mean over. `log(metrics, step)` is called for each entry of the history; `extra_loss(model)`
    is added to the loss of each step, and not reported in it. Afterwards everything but the
    weights is as before (`models.unchanged`). `label` names the training where it is shown; an
    interrupt ends it after the step (`progress.Live`). `dropout`: whether the model's is on.

    Raises ValueError for settings or examples that cannot work, before training, and
    FloatingPointError as soon as the loss is not finite; checkpoints in `output_dir` stay. So
    that a cell that is run again does not train on, it also refuses a model that an earlier
    cell trained with this loss, unless `again`.
    """
    config = config or TrainConfig()
    checkpoints.check_folder(output_dir, config)
    packing = _check(model, examples, config)
    made, checkpoint = _resumed(model, examples, loss, config)
    train_once(model, name_of(loss), again or bool(config.resume))
    with contextlib.ExitStack() as stack:
        folder = output_dir or stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(unchanged(model))
        if not dropout:
            from trl.trainer.utils import disable_dropout_in_model

            disable_dropout_in_model(model)
        stack.enter_context(models.no_progress_bar())  # of checkpoints
        collate = partial(collate, packing=packing)
        live, held_out = stack.enter_context(Live(label, progress)), None
        if progress and eval_examples is not None:
            some = eval_examples[:64]  # shown now and then; all of them count at the end
            held_out = partial(mean_loss, model, some, loss, collate, config.batch_size)
        history = History(log, live, held_out)
        arguments = _arguments(model, config, str(folder))
        trainer = _Trainer(model, arguments, collate, list(examples), callbacks=[history])
        trainer.batch_loss, trainer.extra_loss = loss, extra_loss
        trainer.history, trainer.made = history, made
        trainer.model_accepts_loss_kwargs = True  # so that accumulated losses come scaled by weight
        trainer.remove_callback(PrinterCallback)
        if config.compile:
            models.base_model(model).base_model.compile(dynamic=True)
        if on_gpu := torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        start, evaluated = time.perf_counter(), None
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except KeyboardInterrupt:  # in the middle of a step that takes long
            if not (live.stopping and history.entries):
                raise
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() if on_gpu else peak_memory()
        if eval_examples is not None:
            wrapped = trainer.model_wrapped
            evaluated = mean_loss(wrapped, eval_examples, loss, collate, config.batch_size)
            if log is not None:
                log({"eval_loss": evaluated}, trainer.state.global_step)
    losses = [entry["loss"] for entry in history.entries]
    if len(losses) > 2 * SMOOTH and (end := fmean(losses[-SMOOTH:])) > losses[0]:
        fell = f"the loss did not fall, from {losses[0]:.3f} to {end:.3f}"
        logger.warning("%s: is learning_rate %g too high?", fell, config.learning_rate)
    step, total = history.entries[-1]["step"], trainer.state.max_steps
    stopped = STOPPED.format(step, total) if step < total else ""
    speed = seconds, history.tokens, history.tokens / seconds
    return TrainResult(history.entries, losses[-1], step, *speed, peak, evaluated, stopped)


def name_of(loss: Loss) -> str:
    return getattr(getattr(loss, "func", loss), "__qualname__", type(loss).__name__)


def train_once(model: nn.Module, how: str, again: bool) -> None:
    """Raises ValueError if a notebook's earlier cell trained `model` this way, unless `again`."""
    number, trained = cell(), _trained.setdefault(model, {})
    if number is not None and trained.get(how, number) != number and not again:
        raise ValueError(
            "model: it was trained already, and would be trained on. Run the cell that makes it "
            "first, or pass again=True to go on from what it learned"
        )
    if number is not None:
        trained[how] = number


@torch.no_grad()
def mean_loss(
    model: nn.Module,
    examples: Sequence[Any],
    loss: Loss,
    collate: Callable[..., Any] = pack,
    batch_size: int = 32,
) -> float:
    """The mean of `loss` over examples, in eval mode; those of similar length share a batch."""
    device, total, weight = next(model.parameters()).device, 0.0, 0
    ordered = sorted(examples, key=lambda example: sum(len(one.ids) for one in flat([example])))
    with logprobs.evaluating(model):
        for start in range(0, len(ordered), batch_size):
            batch = collate(ordered[start : start + batch_size]).to(device)
            total += float(loss(model, batch)[0]) * batch.weight
            weight += batch.weight
    return total / weight


class _Trainer(Trainer):
    """Transformers' trainer, given a loss of batches and a history of our own."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with self.accelerator.autocast():  # around all of it, so that weights are cast once
            loss, metrics = self.batch_loss(model, inputs)
        share = inputs.weight / num_items_in_batch if num_items_in_batch else 1.0
        seen = {name: value.detach() * share for name, value in ({"loss": loss} | metrics).items()}
        self.history.add(seen, inputs.tokens)
        loss = loss * (share * self.accelerator.num_processes)  # of which DDP takes the mean
        if self.extra_loss is not None:
            loss = loss + self.extra_loss(self.model) / self.current_gradient_accumulation_steps
        if loss.device.type == "cpu":  # free here; elsewhere it would wait for the device
            check_finite(loss.item(), self.state.global_step + 1, self._get_learning_rate())
        return loss

    def _get_num_items_in_batch(self, batch_samples, device):
        total = sum(batch.weight for batch in batch_samples)
        if self.args.world_size > 1:
            return int(self.accelerator.gather(torch.tensor([total], device=device)).sum())
        return total

    def _prepare_inputs(self, inputs):
        return inputs.to(self.args.device)

    def _get_train_sampler(self, train_dataset=None):
        return Shuffled(len(self.train_dataset), self.args.seed)

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            checkpoints.complete(folder, self.made)

    def floating_point_ops(self, inputs) -> int:
        return 0  # counting walks over all parameters at each step


def _arguments(model: nn.Module, config: TrainConfig, folder: str) -> Arguments:
    on_cpu = next(model.parameters()).device.type == "cpu"
    wanted = {"auto": models.autocast_dtype(model), "bf16": torch.bfloat16, "fp32": None}
    half = wanted[config.precision] is not None
    if half and on_cpu:
        models.use_float32_attention(model)
    constant = config.schedule == "constant"
    return Arguments(
        output_dir=folder,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        warmup_steps=config.warmup_ratio,
        lr_scheduler_type="constant_with_warmup" if constant else config.schedule,
        optim=config.optimizer,
        activation_checkpointing=config.gradient_checkpointing,
        bf16=half,
        use_cpu=on_cpu,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 500,
        save_total_limit=2,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        **{name: getattr(config, name) for name in SAME_NAME},
    )


def _check(model: nn.Module, examples: Sequence[Any], config: TrainConfig) -> bool:
    """Raises ValueError for what cannot work; returns whether examples are packed."""
    if config.gradient_checkpointing and logprobs.has_soft_prompt(model):
        raise ValueError("gradient_checkpointing: expected False with a prefix, got True")
    if config.gradient_checkpointing and not hasattr(model, "activation_checkpointing_enable"):
        kind = type(model).__name__  # a reward model's stays in eval mode, where there is none
        raise ValueError(f"gradient_checkpointing: expected False with a {kind}, got True")
    if len(examples) == 0:
        raise ValueError("examples: expected at least one, got none")
    context = models.context_length(model) or sys.maxsize
    vocabulary = models.base_model(model).get_input_embeddings().num_embeddings
    for number, item in enumerate(examples, start=1):
        for ids, mask in flat([item]):
            if len(ids) != len(mask) or not mask[1:].any():
                problem = f"a mask of its {len(ids)} ids, with a token to learn, got {mask}"
            elif len(ids) > context:
                problem = f"at most {context} tokens, the model's context, got {len(ids)}"
            elif ids.max() >= vocabulary:
                problem = f"ids below {vocabulary}, the model's vocabulary, got {ids.max()}"
            else:
                continue
            raise ValueError(f"example {number}: expected {problem}")
    models.warn_of_half_precision(model)
    apart = config.packing is not False and logprobs.keeps_apart(model)
    if config.packing is True and not apart:
        raise ValueError("packing: this model lets packed examples see each other; leave it off")
    return apart if config.packing == "auto" else config.packing


def _resumed(
    model: Any, examples: Sequence[Any], loss: Any, config: TrainConfig
) -> tuple[dict[str, Any], str | None]:
    """What the run is made with, and the checkpoint that it goes on from."""
    if not config.save_steps and not config.resume:
        return {}, None
    made = {name: value for name, value in asdict(config).items() if name not in FREE}
    made |= checkpoints.fingerprint(model, examples)
    made["loss"] = name_of(loss)
    adapters = map(vars, getattr(model, "peft_config", {}).values())
    for options in (*adapters, getattr(loss, "keywords", {})):  # alpha and dropout; beta of a loss
        made |= {name: x for name, x in options.items() if isinstance(x, int | float)}
    return made, str(checkpoints.newest(config.resume, made)) if config.resume else None
