"""Will it fit? What a training run needs, before it starts, and what it took.

    plan("Qwen/Qwen2.5-7B", "qlora", batch_size=8, sequence_length=2048, device="cuda")

Of a model only the configuration is read: a step is simulated on fake tensors (`simulation`). Beside
what the allocator sees, a run needs what Python, its libraries and the driver take: the runtime
overhead. Numbers are decimal, 1 GB is 10^9 bytes.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import textwrap
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch

from labkit import models, plots
from labkit.show import Table
from labkit.simulation import OVERHEAD, STATES, WEIGHTS, Setting, depths, simulate


@dataclass(frozen=True)
class Plan:
    """What a run will need: `parts`, bytes by name, add up to `total`.

    `allocated` is what torch's allocator should say: no runtime overhead, no paged states on a GPU.
    `names`, of a notebook's parameters, are all that its reader can change.
    """

    name: str
    config: Any
    depths: tuple[int, ...]
    setting: Setting
    device_memory: float | None  # None: not known
    parts: dict[str, float]
    names: Mapping[str, str] | None = None  # of settings: the parameters

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def allocated(self) -> float:
        paged = self.setting.device == "cuda" and self.setting.optimizer.startswith("paged")
        return self.total - self.parts[OVERHEAD] - paged * self.parts[STATES]

    @property
    def fits(self) -> bool | None:
        return None if self.device_memory is None else self.total <= self.device_memory

    @cached_property
    def nearest(self) -> Plan | None:
        """The plan of the first milder setting that fits, or None; itself, if it does."""
        if self.fits is not False:
            return self
        milder = [*_milder(self.setting, self.names)]
        first = bisect_left(milder, True, key=lambda setting: bool(self._at(setting).fits))
        return self._at(milder[first]) if first < len(milder) else None

    def _at(self, setting: Setting) -> Plan:
        return replace(self, setting=setting, parts=simulate(self.config, setting, self.depths))

    @property
    def advice(self) -> str:
        """Whether it fits, with the numbers, and what to change so that it would."""
        need = f"Needs {_readable(self.total)}"
        if self.device_memory is None:
            return f"{need}; give device_memory in bytes, which is not known here."
        need += f" of {_readable(self.device_memory)}"
        if self.fits or self.nearest is None:
            return f"{need}: it fits." if self.fits else f"{need}; take a smaller model."
        before, after = asdict(self.setting), asdict(self.nearest.setting)
        changed = [k for k in before if before[k] != after[k]]
        change = ", ".join(f"{(self.names or {}).get(k, k)}={after[k]!r}" for k in changed)
        return f"{need}. Nearest setting that fits: {change} ({_readable(self.nearest.total)})."

    @property
    def title(self) -> str:
        s = self.setting
        again = ", checkpointing" if s.gradient_checkpointing else ""
        size = f"{s.batch_size} × {s.sequence_length} tokens{again}"
        return f"{self.name} · {s.technique} · {s.precision} · {size} · {s.device}"

    def rows(self) -> list[dict[str, str]]:
        """The parts and their sum as rows of a table."""
        return [
            {"part": part, "needs": _readable(size), "share": f"{size / self.total:.1%}"}
            for part, size in (self.parts | {"total": self.total}).items()
        ]

    def __repr__(self) -> str:
        return f"{self.title}\n{Table(self.rows())!r}\n{self.advice}"

    def _repr_html_(self) -> str:
        sign = {True: "✔ ", False: "✘ ", None: ""}[self.fits]
        said, table = f"{sign}{escape(self.advice)}", Table(self.rows())._repr_html_()
        scale, left, bar = 500 / max(self.total, self.device_memory or 0), 0.0, ""
        for size, colour in zip(self.parts.values(), plots.COLOURS, strict=False):
            bar += f'<rect x="{left}" width="{size * scale}" height="20" fill="{colour}"/>'
            left += size * scale
        if self.device_memory is not None:
            bar += f'<rect x="{self.device_memory * scale - 2}" width="2" height="24" fill="#888"/>'
        bar = f'<svg width="500" height="24" role="img" aria-label="parts">{bar}</svg>'
        return f"<p><b>{said}</b></p>{bar}<p>{escape(self.title)}</p>{table}"

    def figure(self) -> Any:
        """The parts on top of each other, and the device's limit as a line."""
        title, foot = textwrap.fill(self.title, 50), 0.0
        figure, axes = plots.figure_axes(title=title, ylabel="memory (GB)")
        for (part, size), colour in zip(self.parts.items(), plots.COLOURS, strict=False):
            axes.bar([self.setting.technique], size / 1e9, 0.5, foot, color=colour, label=part)
            foot += size / 1e9
        if self.device_memory is not None:
            axes.axhline(self.device_memory / 1e9, color="#333333", linestyle="--", label="device")
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        return figure


def _readable(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _milder(s: Setting, names: Mapping[str, str] | None) -> Iterator[Setting]:
    """Settings that may need less, the mildest change first, each on top of those before."""
    sizes = max(1, s.batch_size // 2), 1
    if s.technique == "ppo":
        steps: list[dict[str, Any]] = [{"batch_size": size} for size in sizes]
        steps.append({"rank": s.rank or 8})
    else:  # the batch of a step stays what it was
        count = s.gradient_accumulation * s.batch_size
        steps = [{"batch_size": n, "gradient_accumulation": count // n} for n in sizes]
        if s.technique not in ("prefix", "reward"):
            steps.insert(1, {"gradient_checkpointing": True})
        if s.technique in ("full", "reward"):
            steps.append({"optimizer": "paged_adamw_8bit" if s.device == "cuda" else "adamw_8bit"})
        others = {"full": ["lora", "qlora"], "qlora": [], "reward": []}
        steps += [{"technique": other} for other in others.get(s.technique, ["qlora"])]
    steps += [{"sequence_length": max(2, s.sequence_length >> k)} for k in (1, 2, 3)]
    for step in steps:
        can = {k: value for k, value in step.items() if names is None or k in names}
        before, s = s, replace(s, **can)
        if s != before:
            yield s


def plan(
    model: Any = "tinytown",
    technique: str = "lora",
    *,
    device: str = "auto",
    precision: str = "auto",
    device_memory: float | None = None,
    **options: Any,
) -> Plan:
    """What training `model` with `technique` needs; further options are `Setting`'s.

    `model`: "tinytown", a folder, a hub id, a configuration, a dict with `model_type`, or a model,
    whose configuration is read. "auto" is what labkit does: a GPU if there is one, bfloat16
    arithmetic where it pays. `device_memory`, in bytes, is by default what is free here. Raises
    ValueError for settings that cannot work, OSError for a configuration that cannot be read.
    """
    network = models.meta_model(getattr(model, "config", model))
    config, count = network.config, models.parameter_counts(network).total
    size = f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"
    name = model if isinstance(model, str) else config.name_or_path or config.model_type
    device = models.find_device() if device == "auto" else device.partition(":")[0]
    if precision == "auto":
        half = device == "cuda" or (models.cpu_has_bf16() and count >= 1_000_000)
        precision = "mixed" if half else "fp32"
    fixed: dict[str, Any] = {"technique": technique, "device": device, "precision": precision}
    setting, found = Setting(**fixed, **options), depths(network)
    memory = free(device) if device_memory is None else float(device_memory)
    parts = simulate(config, setting, found)
    return Plan(f"{name}, {size} parameters", config, found, setting, memory, parts)


def free(device: str) -> float | None:
    """Bytes that a run may take on "cpu", of the container, or "cuda"; None without one."""
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else None
    found, group = psutil.virtual_memory().available, Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # without a limit
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        found = min(found, limit - used)
    return float(found)


@contextlib.contextmanager
def measured(model: Any) -> Iterator[SimpleNamespace]:
    """Measures what runs inside `with`, on the device of `model`, whose own bytes are added.

    `peak_bytes` of what it gives, known at the end, is the most that the allocator held at a time.
    On a CPU the profiler slows down what it watches: a few steps are enough.
    """
    gc.collect()  # what an earlier measurement left would count as freed, and hide part of the peak
    found, before = SimpleNamespace(peak_bytes=0), held(model)
    if next(model.parameters()).device.type == "cuda":
        others = torch.cuda.memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        yield found
        found.peak_bytes = torch.cuda.max_memory_allocated() - others
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it announces each start otherwise
    with torch.autograd.profiler.profile(profile_memory=True) as record:
        yield found
    events = [event for event in record.kineto_results.events() if event.name() == "[memory]"]
    sizes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    found.peak_bytes = before + max(itertools.accumulate(sizes), default=0)


def held(model: Any) -> int:
    """Bytes of a model: parameters, buffers and scales of quantization, shared ones once."""
    states = [p.quant_state for p in model.parameters() if hasattr(p, "quant_state")]
    scales = [t for s in states for t in (s.absmax, *([s.state2.absmax] if s.nested else []))]
    storages = (t.untyped_storage() for t in (*model.parameters(), *model.buffers(), *scales))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


LLAMA = {  # hidden, inner, layers, heads (Touvron et al. 2023, arXiv:2302.13971, table 2)
    "7B": (4096, 11008, 32, 32),
    "13B": (5120, 13824, 40, 40),
    "65B": (8192, 22016, 80, 64),
}
CHAPTER = {"full": (28, 52, 260), "lora": (12, 20, 120), "qlora": (6, 10, 48)}  # GB, in 5.3.2
REASONS = {
    "full": "the chapter counts float32 weights alone; gradients and AdamW's states come on top",
    "lora": "the frozen weights alone take {} in bfloat16",
    "qlora": "the weights take {}; the chapter's figure leaves room for more or longer examples",
}


def llama(size: str) -> dict[str, Any]:
    """The configuration of LLaMA of this size: "7B", "13B" or "65B"."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    shape = dict(zip(names, LLAMA[size], strict=True))
    return {"model_type": "llama", "vocab_size": 32_000, "tie_word_embeddings": False, **shape}


def chapter_table() -> list[dict[str, Any]]:
    """The chapter's nine numbers next to the planner's, in GB, with the reason for a difference.

    One example of 512 tokens on a GPU, checkpointing, rank 16; float32 weights with bfloat16
    arithmetic where all of them train, else bfloat16.
    """
    rows: list[dict[str, Any]] = []
    options: dict[str, Any] = {"device": "cuda", "gradient_checkpointing": True, "rank": 16}
    for technique, size in itertools.product(CHAPTER, LLAMA):
        precision = "mixed" if technique == "full" else "bf16"
        found = plan(llama(size), technique, precision=precision, **options)
        names = ("model", "technique", "chapter, GB", "planned, GB", "reason")
        numbers = CHAPTER[technique][[*LLAMA].index(size)], round(found.total / 1e9, 1)
        reason = REASONS[technique].format(_readable(found.parts[WEIGHTS]))
        rows.append(dict(zip(names, (f"LLaMA-{size}", technique, *numbers, reason), strict=True)))
    return rows


STAGES = {  # the techniques that a notebook trains, and the parameter that can leave one out
    "full_finetuning": {"full": ""},
    "instruction_tuning": {"full": ""},
    "self_instruct": {"full": ""},
    "lora": {"lora": "", "full": "full_learning_rate"},
    "qlora": {"qlora": "", "lora": "compare"},
    "prefix_tuning": {"prefix": ""},
    "adapter": {"adapter": ""},
    "reward_model": {"full": "", "reward": ""},
    "rlhf": {"full": "", "reward": "", "ppo": ""},
    "dpo": {"full": ""},
    "orpo": {"full": ""},
    "alignment_comparison": {"reward": "", "full": ""},
    "peft_comparison": {t: f"{t}_learning_rate" for t in "full lora qlora prefix adapter".split()},
}
NAMES = {"max_length": "sequence_length", "length": "prefix_length"}  # a notebook's: ours


def plan_notebook(name: str, values: Mapping[str, Any]) -> list[Plan]:
    """The plan of each stage of a notebook (02_lora) with these parameters; none of an unknown one.

    Examples are taken to be as long as they may be. While PPO runs, the tuned model and the reward
    model are there beside the policy and its reference.
    """
    own = {NAMES.get(key, key): value for key, value in values.items() if value != "auto"}
    common = {key: own[key] for key in Setting.__dataclass_fields__ if key in own}  # type: ignore[attr-defined]
    if own.get("dtype") in ("bfloat16", "float16"):
        common["precision"] = "bf16"
    if "minibatch_size" in own:
        common["batch_size"] = min(16, own["minibatch_size"])
    if name.endswith(("_rlhf", "_reward_model", "_alignment_comparison")):
        common["ranked"] = 4  # pairs have two responses, rankings up to nine
    plans: list[Plan] = []
    for technique, switch in STAGES.get(name.partition("_")[2], {}).items():
        stage: dict[str, Any] = {}
        names = {NAMES.get(key, key): key for key in values}
        if "minibatch_size" in own:
            names["batch_size"] = "minibatch_size"
        if technique == "reward":
            stage["precision"] = "auto"  # its model is a float32 copy, whatever the policy's type
        if plans and "methods" in own:  # base, SFT and reward model, and the policies before it
            stage["held"] = (own["methods"].count(",") + 3) * plans[-1].parts[WEIGHTS]
        if technique == "ppo":
            stage = {"batch_size": own["minibatch_size"], "rank": own["lora_rank"]}
            stage["response_share"] = min(1.0, own["max_new_tokens"] / own["sequence_length"])
            stage["held"] = plans[-1].parts[WEIGHTS]
            names["rank"] = "lora_rank"
        if name.endswith(("_dpo", "_orpo")):  # two responses; no reference is loaded
            technique = "lora" if own["lora_rank"] else technique
            stage = {"rank": own["lora_rank"] or None}
            stage["sequence_length"] = 2 * own["sequence_length"]
            del names["sequence_length"]
        if not switch or own.get(switch):
            found = plan(own.get("model", "tinytown"), technique, **common | stage)
            plans.append(replace(found, names=names))
    return plans


def check_fits(name: str, values: Mapping[str, Any]) -> None:
    """Raises ValueError, with the numbers and what would fit, for a stage that does not fit."""
    if values.get("model", "tinytown") == "tinytown":  # fits wherever a notebook runs
        return
    try:
        plans = plan_notebook(name, values)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{name}: not planned ({error}); --force runs it all the same") from error
    for found in plans:
        if found.fits is False:
            raise ValueError(f"{name}, {found.title}: {found.advice} --force runs it all the same")
