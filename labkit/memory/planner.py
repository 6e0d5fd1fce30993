"""The plan of a run: its parts at the worst moment, whether it fits, and what would.

The formulas are in `footprint`; here they are applied to a model's configuration and a device.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from html import escape
from typing import Any

from labkit import models, plots
from labkit.memory import allocator
from labkit.memory.footprint import PARTS, Parts, moments
from labkit.memory.reading import read
from labkit.memory.shapes import Setting, Shape

MOMENTS = {
    "forward": "the forward pass has ended",
    "loss": "the loss goes back through the logits",
    "last block": "the backward pass enters the last block",
    "first block": "the backward pass reaches the first block",
    "update": "all gradients are there",
    "trial": "four rows are tried out before training",
}
COLOURS = (*plots.COLOURS, "#c99bbf", "#8fb8de", "#c8ccd0")  # one a part


@dataclass(frozen=True)
class Plan:
    """What a run will need. `parts`: bytes by name at the worst moment; they add up to `total`.

    `allocated` is what torch's allocator should say: the framework is not in it, nor are paged
    states on a GPU, which live in memory that the driver can move to the host.
    """

    name: str
    shape: Shape
    setting: Setting
    device_memory: float | None = None

    @cached_property
    def moments(self) -> dict[str, Parts]:
        """The parts at each moment that can be the worst; see `MOMENTS`."""
        return moments(self.shape, self.setting)

    @property
    def moment(self) -> str:
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> Parts:
        return {name: self.moments[self.moment][name] for name in PARTS}

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def allocated(self) -> float:
        paged = self.setting.device == "cuda" and self.setting.optimizer.startswith("paged")
        elsewhere = self.parts["framework"] + (self.parts["optimizer states"] if paged else 0)
        return self.total - elsewhere

    @property
    def fits(self) -> bool | None:
        """Whether it fits the device; None where the device's memory is not known."""
        return None if self.device_memory is None else self.total <= self.device_memory

    @cached_property
    def nearest(self) -> Plan | None:
        """The plan with the mildest change of the setting that fits; itself, if it does."""
        plans = (replace(self, setting=setting) for setting in _milder(self.setting))
        return next((plan for plan in (self, *plans) if plan.fits is not False), None)

    @property
    def advice(self) -> str:
        """Whether it fits, with the numbers, and what to change so that it would."""
        if self.device_memory is None:
            return "How much memory the device has is not known here; give device_memory in bytes."
        need = f"Needs {readable(self.total)} of {readable(self.device_memory)}"
        if self.fits:
            return f"{need}: it fits."
        if self.nearest is None:
            return f"{need}, and no setting known here makes it fit; take a smaller model."
        before, after = asdict(self.setting), asdict(self.nearest.setting)
        change = ", ".join(f"{k}={after[k]!r}" for k in before if before[k] != after[k])
        return f"{need}. Nearest setting that fits: {change} ({readable(self.nearest.total)})."

    @property
    def title(self) -> str:
        s = self.setting
        again = ", checkpointing" if s.gradient_checkpointing else ""
        return (f"{self.name} · {s.technique} · {s.precision} · {s.batch_size} × "
                f"{s.sequence_length} tokens{again} · {s.device}")  # fmt: skip

    def rows(self) -> list[dict[str, str]]:
        """The parts at the worst moment as rows of a table, and their sum."""
        parts = {name: size for name, size in self.parts.items() if size} | {"total": self.total}
        return [{"part": name, "needs": readable(size), "share": f"{size / self.total:.1%}"}
                for name, size in parts.items()]  # fmt: skip

    def __repr__(self) -> str:
        from labkit.tracking import Table

        return f"{self.title}\n{Table(self.rows())!r}\nWorst: {MOMENTS[self.moment]}. {self.advice}"

    def _repr_html_(self) -> str:
        from labkit.tracking import Table

        told = f"Worst: {MOMENTS[self.moment]}. {self.advice}"
        table = Table(self.rows())._repr_html_()
        return f"<p><b>{escape(self.title)}</b></p>{table}<p>{escape(told)}</p>"

    def figure(self) -> Any:
        """Stacked bars: the parts at each moment, and the device's limit as a line."""
        return stacked(self.moments, limit=self.device_memory, title=self.title)


def plan(
    model: Any = "tinytown",
    technique: str = "lora",
    *,
    optimizer: str = "adamw_torch_fused",
    precision: str = "auto",
    batch_size: int = 1,
    sequence_length: int = 512,
    gradient_accumulation: int = 1,
    gradient_checkpointing: bool = False,
    attention: str = "sdpa",
    response_share: float = 1.0,
    rank: int = 8,
    targets: str | tuple[str, ...] = "all-linear",
    prefix_length: int = 20,
    bottleneck: int = 64,
    placement: str = "houlsby",
    device: str = "auto",
    device_memory: float | None = None,
) -> Plan:
    """What training `model` with `technique` needs, see `Plan`; the settings are `Setting`'s.

    `model`: "tinytown", a folder, a hub id, a configuration, a dict with `model_type`, or a model
    without adapters. `precision` "auto" is what labkit does: bf16 on a GPU, mixed on a CPU with
    bfloat16, else fp32. `device` "auto" is the GPU if there is one. `device_memory`, in bytes, is
    by default what is free on that device here. Raises ValueError for settings that cannot work,
    FileNotFoundError or ConnectionError for a configuration that cannot be had.
    """
    name, shape = read(model)
    device = _device(device)
    setting = Setting(
        technique=technique, device=device, precision=_precision(precision, device, shape),
        optimizer=optimizer, batch_size=batch_size, sequence_length=sequence_length,
        gradient_accumulation=gradient_accumulation, attention=attention, rank=rank,
        gradient_checkpointing=gradient_checkpointing, response_share=response_share,
        targets=targets, prefix_length=prefix_length, bottleneck=bottleneck, placement=placement,
    )  # fmt: skip
    shape.targeted(targets)
    memory = allocator.free(device) if device_memory is None else device_memory
    return Plan(name, shape, setting, memory)


def fits(plan: Plan, device: str | float) -> bool:
    """Whether a plan fits "cpu" or "cuda" as it is here now, or so many bytes.

    Raises ValueError without such a device.
    """
    memory = allocator.free(device) if isinstance(device, str) else device
    if memory is None:
        raise ValueError(f"device: expected one that is here, or bytes, got {device!r}")
    return plan.total <= memory


def _device(device: str) -> str:
    if device != "auto":
        return device.partition(":")[0]
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _precision(precision: str, device: str, shape: Shape) -> str:
    if precision != "auto":
        return precision
    if device == "cuda":
        return "bf16"
    return "mixed" if models.cpu_has_bf16() and shape.parameters >= 1_000_000 else "fp32"


def _milder(s: Setting) -> Iterator[Setting]:
    """Settings that may need less, the mildest change first.

    Fewer rows at a time, accumulated to as many, and checkpointing cost time. Then come coarser
    states and weights, another technique, and at last shorter texts.
    """
    rows = [d for d in range(s.batch_size, 0, -1) if s.batch_size % d == 0]
    other = {"full": ("lora", "qlora"), "qlora": ()}.get(s.technique, ("qlora",))
    coarse = "paged_adamw_8bit" if s.device == "cuda" else "adamw_8bit"
    lengths = [s.sequence_length >> k for k in range(8) if s.sequence_length >> k >= 64]
    dials: list[list[tuple[float, dict[str, Any]]]] = [
        [(math.log2(s.batch_size / d), dict(
            batch_size=d, gradient_accumulation=s.gradient_accumulation * s.batch_size // d
        )) for d in rows],
        [(0, {}), (2, {"gradient_checkpointing": True})],
        [(0, {}), (5, {"optimizer": coarse})],
        [(0, {}), (5, {"precision": "bf16"})],
        [(0, {}), *((10 + k, {"technique": name}) for k, name in enumerate(other))],
        [(20 * k, {"sequence_length": length}) for k, length in enumerate(lengths)],
    ]  # fmt: skip
    for choice in sorted(itertools.product(*dials), key=lambda c: sum(cost for cost, _ in c)):
        changes = {name: value for _, change in choice for name, value in change.items()}
        with contextlib.suppress(ValueError):  # a prefix cannot be checkpointed
            yield replace(s, **changes)


def readable(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def stacked(bars: Mapping[str, Parts], *, title: str, limit: float | None = None) -> Any:
    """A bar for each label, its parts on top of each other, and a dashed line at `limit` bytes."""
    most = max(sum(parts.values()) for parts in bars.values())
    unit, name = (1e9, "GB") if most >= 1e9 else (1e6, "MB")
    figure, axes = plots._axes("moment of a training step", f"memory ({name})", title)
    foot = dict.fromkeys(bars, 0.0)
    for part, colour in zip(PARTS, COLOURS, strict=True):
        heights = {label: parts[part] / unit for label, parts in bars.items()}
        if any(heights.values()):
            axes.bar(list(bars), list(heights.values()), 0.6, bottom=list(foot.values()),
                     color=colour, label=part)  # fmt: skip
        foot = {label: foot[label] + heights[label] for label in bars}
    if limit is not None:
        axes.axhline(limit / unit, color="#333333", linestyle="--", linewidth=1, label="device")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
