"""Will it fit? What a training run needs, simulated before it starts, and what it took.

    plan("Qwen/Qwen2.5-7B", "qlora", batch_size=8, sequence_length=2048, device="cuda")

A step of the project's own training code runs on fake tensors, which have sizes and lifetimes but no
content, and a ledger adds up what lives; of a model only the configuration is read. At each point of
a step memory is linear in the number of equal blocks, so three and two of them tell. Beside what the
allocator sees, a run needs what Python, its libraries and the driver take: the runtime overhead.
Left out: several devices, sampling, gaps between the allocator's blocks. 1 GB is 10^9 bytes.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from labkit import batching, models, plots, training
from labkit.config import Count, Natural, NonNegative, Probability, settings
from labkit.show import Table
from labkit.techniques import adapter, full, lora, ppo, prefix, reward, rollout

PARTS = ("weights", "gradients", "optimizer states", "activations and rest", "runtime overhead")
WEIGHTS, GRADIENTS, STATES, REST, OVERHEAD = PARTS
FIXED = {  # bytes: Python and its libraries, measured; CUDA's context, cuBLAS's workspace on Hopper
    "cpu": {OVERHEAD: 550e6},
    "cuda": {OVERHEAD: 600e6, REST: 32 * 2.0**20},
}


@settings
class Setting:
    """How labkit trains a model on a device; `batch_size` is in rankings, of `ranked` responses.

    `precision`: "bf16" (weights and arithmetic), "mixed" (float32 weights, bfloat16 arithmetic) or
    "fp32"; adapters are float32. `response_share`: responses' share of the tokens. `rank` None is 8
    for LoRA, and all weights for PPO, whose `batch_size` is a minibatch's. `held`: bytes of other
    models that are there.
    """

    technique: Literal["full", "lora", "qlora", "prefix", "adapter", "reward", "ppo"] = "lora"
    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["bf16", "mixed", "fp32"] = "mixed"
    optimizer: Literal[
        "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "sgd"
    ] = "adamw_torch_fused"
    batch_size: Count = 1
    sequence_length: Count = 512
    gradient_accumulation: Count = 1
    gradient_checkpointing: bool = False
    response_share: Probability = 1.0
    rank: Natural | None = None
    targets: str | tuple[str, ...] = "all-linear"
    prefix_length: Count = 20
    bottleneck: Count = 64
    placement: Literal["houlsby", "pfeiffer"] = "houlsby"
    ranked: Count = 2
    held: NonNegative = 0.0


class _Ledger(TorchDispatchMode):
    """Adds up the storages that live, by part, and keeps each phase's parts at its most."""

    def __init__(self) -> None:
        super().__init__()
        self.part: dict[int, str] = {}  # of a living storage
        self.live: Counter[str] = Counter()
        self.most: dict[str, Counter[str]] = {}
        self.phase = ""

    def begin(self, phase: str) -> None:
        self.phase = phase
        if self.live.total() > self.most.get(phase, Counter()).total():
            self.most[phase] = self.live.copy()

    def label(self, tensors: Any, part: str) -> None:
        for storage in (tensor.untyped_storage() for tensor in tensors):
            key, size = storage._cdata, storage.nbytes()
            if key in self.part:
                self.live[self.part[key]] -= size
            else:
                weakref.finalize(storage, self._freed, key, size)
            self.part[key] = part
            self.live[part] += size
        self.begin(self.phase)

    def _freed(self, key: int, size: int) -> None:
        self.live[self.part.pop(key)] -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_iter(out) if isinstance(leaf, Tensor)]
        self.label((t for t in tensors if t.untyped_storage()._cdata not in self.part), REST)
        return out


class _Linear4bit(nn.Linear):
    """Stand-in for bitsandbytes' layer: 4.127 bits per weight (NF4, double quantization)."""

    def __init__(self, layer: Any) -> None:
        nn.Module.__init__(self)
        shape = reversed(layer.weight.shape) if isinstance(layer, Conv1D) else layer.weight.shape
        (self.out_features, self.in_features), self.bias = shape, layer.bias
        size, self.dtype = int(layer.weight.numel() * 4.127 / 8), layer.weight.dtype
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), False)

    def forward(self, x: Tensor) -> Tensor:
        h = _Product.apply(x.to(self.dtype), self.out_features)
        return (h if self.bias is None else h + self.bias).to(x.dtype)


class _Product(torch.autograd.Function):
    """x Wᵀ, outside of autocast, where W, dequantized, exists during the product only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out: int) -> Tensor:
        ctx.shape = out, x.shape[-1]
        with torch.autocast("cpu", enabled=False):
            return F.linear(x, x.new_empty(ctx.shape))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ gradient.new_empty(ctx.shape), None


def _attached(network: Any, s: Setting) -> Any:
    """What a run trains of a causal language model on the meta device."""
    if s.technique == "reward":
        return reward.Scorer(reward.with_head(network, SimpleNamespace(pad_token_id=0)))
    if s.technique == "full" or (s.technique == "ppo" and not s.rank):
        model = full.attach(network, full.FullConfig())
    elif s.technique == "prefix":
        model = prefix.attach(network, prefix.PrefixConfig(length=s.prefix_length))
    elif s.technique == "adapter":
        config = adapter.AdapterConfig(bottleneck=s.bottleneck, placement=s.placement)
        model = adapter.attach(network, config)
    else:
        for name, layer in lora.find_targets(network).items() if s.technique == "qlora" else ():
            network.set_submodule(name, _Linear4bit(layer))
        rank = 8 if s.rank is None else s.rank
        model = lora.attach(network, lora.LoraConfig(rank=rank, targets=s.targets))
    half = "fp32" if s.precision == "fp32" else "bf16"
    return rollout.PolicyWithValue(model, precision=half) if s.technique == "ppo" else model


def _faked(model: nn.Module) -> nn.Module:
    """The parameters and buffers of a model on the meta device as fake ones, as on a CPU."""
    fresh: dict[int, Any] = {}
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, old in ((name, old) for name, old in own.items() if old is not None):
                new = torch.empty(old.shape, dtype=old.dtype)
                if isinstance(old, nn.Parameter):
                    new = nn.Parameter(new, old.requires_grad)
                own[name] = fresh.setdefault(id(old), (new, old))[0]
    return model


def _batch(s: Setting, mode: FakeTensorMode) -> Any:
    """Examples of equal length, packed where labkit packs: on a CPU."""
    count = max(1, round((s.sequence_length - 1) * s.response_share))
    mask: np.ndarray = np.arange(s.sequence_length) >= s.sequence_length - count
    one = batching.Example(mask.astype(np.int64), mask.astype(np.int64))
    examples = (
        [[one] * s.ranked] * s.batch_size if s.technique == "reward" else [one] * s.batch_size
    )
    collate: Any = reward.pack_rankings if s.technique == "reward" else batching.pack
    batch = collate(examples, packing=s.device == "cpu" and s.technique != "prefix")
    if batch.input_ids.shape == (batch.size, s.sequence_length):  # alone, so that nothing is masked
        batch = collate(examples, packing=False)
    tensors = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return replace(batch, **{name: mode.from_tensor(value) for name, value in tensors.items()})


def _loss(model: nn.Module, batch: Any, s: Setting) -> Tensor:
    if s.technique == "ppo":
        logp, values, _ = model(batch, 1.0)
        names = ("logp", "ref_logp", "values", "advantages", "returns")
        old = {name: torch.zeros_like(logp) for name in names}
        mask = {"mask": torch.ones_like(logp, dtype=torch.bool)}
        return ppo.losses(logp, values, old | mask, 0.1, ppo.PPOConfig())["loss"]
    with torch.autocast("cpu", torch.bfloat16, enabled=s.precision != "fp32"):
        loss = reward.ranking_loss if s.technique == "reward" else training.sft_loss
        return loss(model, batch)[0]


def _step(model: Any, batch: Any, s: Setting, ledger: _Ledger) -> None:
    """The second step of a run: optimizer states are there."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.empty_like(p)
        p.register_post_accumulate_grad_hook(lambda p: ledger.label([p.grad], GRADIENTS))
    optimizer: Any = torch.optim.SGD(trained)
    if "bit" in s.optimizer:  # per number 8 bytes, or 2 and two float32 scales for 256
        each = 8 if "32bit" in s.optimizer else 2 + 8 / 256
        states = [torch.empty(int(p.numel() * each), dtype=torch.uint8) for p in trained]
    elif s.optimizer != "sgd":
        optimizer = torch.optim.AdamW(trained, fused=True)
        optimizer.step()
        states = [tensor for state in optimizer.state.values() for tensor in state.values()]
    ledger.label([] if s.optimizer == "sgd" else states, STATES)
    ledger.label([p.grad for p in trained], GRADIENTS)
    ledger.most.clear()
    if s.technique == "ppo":  # the last gradients are there until the next ones come
        ledger.begin("scoring")
        model.score(batch, 1.0)
    else:
        optimizer.zero_grad()
    for _ in range(min(s.gradient_accumulation, 2)):
        ledger.begin("forward")
        loss = _loss(model, batch, s)
        if s.technique == "ppo":
            optimizer.zero_grad()
        ledger.begin("loss")
        loss.backward()
        del loss
    ledger.begin("update")
    nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()


def _simulated(config: Any, depth: int, s: Setting) -> dict[str, Counter[str]]:
    """The parts of each phase of a step, at its most, for a model of `depth` blocks."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:depth]
    network = models.meta_model(config)
    network = network.to(torch.bfloat16 if s.precision == "bf16" else torch.float32)
    model = _attached(network, s)
    base = models.base_model(model.model if s.technique == "ppo" else model)
    if s.device == "cpu" and (s.precision != "fp32" or s.technique == "ppo"):
        models.use_float32_attention(base)
    if s.gradient_checkpointing:
        base.activation_checkpointing_enable()
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
    both = nn.ModuleList([model, network])  # a reward model is a copy, and the original stays
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, _Ledger() as ledger:
        batch = _batch(s, mode)
        _faked(both.train(s.technique != "ppo"))
        ledger.label(itertools.chain(both.parameters(), both.buffers()), WEIGHTS)
        blocks = _blocks(base, depth)
        for name, block in {"last block": blocks[-1], "first block": blocks[0]}.items():
            block.register_forward_hook(_phase(ledger, name))
        _step(model, batch, s, ledger)
    return ledger.most


def _blocks(model: nn.Module, depth: int) -> list[nn.Module]:
    stacks = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
    return list(next(stacks, [model]))


def _phase(ledger: _Ledger, name: str) -> Any:
    """A forward hook: the phase begins when the gradient reaches what the block gives."""

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: ledger.begin(name))

    return hook


def simulate(config: Any, s: Setting) -> dict[str, float]:
    """The parts of a run at its most, in bytes, by name; of a configuration of transformers."""
    text = config.get_text_config()
    depth, kinds = text.num_hidden_layers, {*(getattr(text, "layer_types", None) or ())}
    blocks = _blocks(models.meta_model(config), depth)
    sizes = {tuple(p.numel() for p in block.parameters()) for block in blocks}
    if depth < 4 or len(sizes) + len(kinds) > 2:  # blocks that differ are all simulated
        phases: Any = _simulated(config, depth, s)
    else:
        three, two = (_simulated(config, n, s) for n in (3, 2))
        phases = {
            phase: {p: parts[p] + (depth - 3) * (parts[p] - two[phase][p]) for p in PARTS}
            for phase, parts in three.items()
        }
    most = max(phases.values(), key=lambda parts: sum(parts.values()))
    return {p: float(most[p] + FIXED[s.device].get(p, 0) + s.held * (p == WEIGHTS)) for p in PARTS}


@dataclass(frozen=True)
class Plan:
    """What a run will need: `parts`, bytes by name, add up to `total`.

    `allocated` is what torch's allocator should say: neither the runtime overhead is in it nor
    paged states on a GPU, which the driver can move to the host. `fits` is None where the device's
    memory is not known.
    """

    name: str
    config: Any
    setting: Setting
    device_memory: float | None
    parts: dict[str, float]

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
        """The plan of the first milder setting that fits; itself, if it does."""
        if self.fits is not False:
            return self
        for setting in _milder(self.setting):
            plan = replace(self, setting=setting, parts=simulate(self.config, setting))
            if plan.fits:
                return plan
        return None

    @property
    def advice(self) -> str:
        """Whether it fits, with the numbers, and what to change so that it would."""
        if self.device_memory is None:
            return "How much memory the device has is not known here; give device_memory in bytes."
        need = f"Needs {_readable(self.total)} of {_readable(self.device_memory)}"
        if self.fits or self.nearest is None:
            return f"{need}: it fits." if self.fits else f"{need}: take a smaller model."
        before, after = asdict(self.setting), asdict(self.nearest.setting)
        change = ", ".join(f"{k}={after[k]!r}" for k in before if before[k] != after[k])
        return f"{need}. Nearest setting that fits: {change} ({_readable(self.nearest.total)})."

    @property
    def title(self) -> str:
        s = self.setting
        again = ", checkpointing" if s.gradient_checkpointing else ""
        size = f"{s.batch_size} × {s.sequence_length} tokens{again}"
        return f"{self.name} · {s.technique} · {s.precision} · {size} · {s.device}"

    def rows(self) -> list[dict[str, str]]:
        """Each part and the total as rows of a table."""
        sizes = self.parts | {"total": self.total}
        return [
            {"part": p, "needs": _readable(size), "share": f"{size / self.total:.1%}"}
            for p, size in sizes.items()
        ]

    def __repr__(self) -> str:
        return f"{self.title}\n{Table(self.rows())!r}\n{self.advice}"

    def _repr_html_(self) -> str:
        table = Table(self.rows())._repr_html_()
        return f"<p><b>{escape(self.title)}</b></p>{table}<p>{escape(self.advice)}</p>"

    def figure(self) -> Any:
        """The parts on top of each other, and the device's limit as a line."""
        figure, axes = plots.figure_axes(title=self.title, ylabel="memory (GB)")
        foot = 0.0
        for (part, size), colour in zip(self.parts.items(), plots.COLOURS, strict=False):
            axes.bar(
                [self.setting.technique], size / 1e9, 0.5, foot / 1e9, color=colour, label=part
            )
            foot += size
        if self.device_memory is not None:
            axes.axhline(self.device_memory / 1e9, color="#333333", linestyle="--", label="device")
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        return figure


def _readable(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _milder(s: Setting) -> Iterator[Setting]:
    """Settings that may need less, the mildest change first, each on top of those before."""
    ppo_ = s.technique == "ppo"
    steps: list[dict[str, Any]] = [{"batch_size": b} for b in {s.batch_size // 2, 1} - {0}]
    other = {"full": ["lora", "qlora"], "qlora": [], "reward": []}.get(s.technique, ["qlora"])
    if s.technique not in ("prefix", "ppo"):
        steps.insert(1, {"gradient_checkpointing": True})
    if s.technique in ("full", "reward"):
        steps.append({"optimizer": "paged_adamw_8bit" if s.device == "cuda" else "adamw_8bit"})
    steps += [{"rank": s.rank or 8}] if ppo_ else [{"technique": name} for name in other]
    steps += [{"sequence_length": s.sequence_length >> k} for k in (1, 2, 3)]
    for change in steps:
        s = replace(s, **change)
        yield s


def plan(
    model: Any = "tinytown",
    technique: str = "lora",
    *,
    device: str = "auto",
    precision: str = "auto",
    device_memory: float | None = None,
    **settings: Any,
) -> Plan:
    """What training `model` with `technique` needs; the other settings are `Setting`'s.

    `model`: "tinytown", a folder, a hub id, a configuration, a dict with `model_type`, or a model,
    whose configuration is read. "auto" is what labkit does: a GPU if there is one, bfloat16
    arithmetic where it pays. `device_memory`, in bytes, is by default what is free here. Raises
    ValueError for settings that cannot work, OSError for a configuration that cannot be read.
    """
    config = _config(model)
    count = models.parameter_counts(models.meta_model(config)).total
    size = f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"
    name = model if isinstance(model, str) else config.name_or_path or config.model_type
    device = models.find_device() if device == "auto" else device.partition(":")[0]
    if precision == "auto":
        half = device == "cuda" or (models.cpu_has_bf16() and count >= 1_000_000)
        precision = "mixed" if half else "fp32"
    setting = Setting(technique, device, precision, **settings)  # type: ignore[arg-type]
    memory = free(device) if device_memory is None else float(device_memory)
    parts = simulate(config, setting)
    return Plan(f"{name}, {size} parameters", config, setting, memory, parts)


def _config(model: Any) -> Any:
    if isinstance(model, str | Path):
        if model == "tinytown":
            from labkit import tinytown

            model = tinytown.base_folder()
        return AutoConfig.from_pretrained(model)
    config = getattr(model, "config", model)
    return AutoConfig.for_model(**config) if isinstance(config, dict) else config


def free(device: str) -> float | None:
    """Bytes that a run may take on "cpu" (of the container) or "cuda"; None without such a device."""
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else None
    found = float(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):  # a control group's limit, if it sets one
        limit, used = (Path(f"/sys/fs/cgroup/memory.{n}").read_text() for n in ("max", "current"))
        found = min(found, float(int(limit) - int(used)))
    return found


@contextlib.contextmanager
def measured(model: Any) -> Iterator[SimpleNamespace]:
    """Measures what runs inside `with`, on the device of `model`, whose own bytes are added.

    `peak_bytes` of what it gives, known when the block has ended, is the most that the allocator
    held at a time. On a CPU the profiler slows down what it watches: a few steps are enough.
    """
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
CHAPTER = {  # GB for the three sizes, in 5.3.2, and why a plan differs
    "full": (
        (28, 52, 260),
        "the chapter counts float32 weights alone; gradients and AdamW's states"
        " take three times as much",
    ),
    "lora": ((12, 20, 120), "the frozen weights alone take {} in bfloat16"),
    "qlora": (
        (6, 10, 48),
        "the weights take {}; the chapter leaves room for more or longer examples",
    ),
}


def llama(size: str) -> dict[str, Any]:
    """The configuration of LLaMA of this size: "7B", "13B" or "65B"."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    shape = dict(zip(names, LLAMA[size], strict=True))
    return {"model_type": "llama", "vocab_size": 32_000, "tie_word_embeddings": False, **shape}


def chapter_table() -> list[dict[str, Any]]:
    """The chapter's nine numbers next to the planner's, in GB, with the reason for a difference.

    One example of 512 tokens on a GPU, checkpointing, rank 16 on all linear layers; full
    fine-tuning in mixed precision, the others on a frozen base in bfloat16.
    """
    rows = []
    for technique, (numbers, reason) in CHAPTER.items():
        precision = "mixed" if technique == "full" else "bf16"
        options: Any = dict(
            device="cuda", precision=precision, gradient_checkpointing=True, rank=16
        )
        for size, number in zip(LLAMA, numbers, strict=True):
            found = plan(llama(size), technique, **options)
            rows.append(
                {
                    "model": f"LLaMA-{size}",
                    "technique": technique,
                    "chapter, GB": number,
                    "planned, GB": round(found.total / 1e9, 1),
                    "reason": reason.format(_readable(found.parts[WEIGHTS])),
                }
            )
    return rows


NOTEBOOKS = {  # by name without its number: the techniques of its stages
    "full_finetuning": ("full",),
    "instruction_tuning": ("full",),
    "lora": ("lora",),
    "qlora": ("qlora",),
    "prefix_tuning": ("prefix",),
    "adapter": ("adapter",),
    "rlhf": ("full", "reward", "ppo"),
    "peft_comparison": ("full", "lora", "qlora", "prefix", "adapter"),
}
NAMES = {
    "batch_size": "batch_size",
    "max_length": "sequence_length",
    "rank": "rank",
    "targets": "targets",
    "length": "prefix_length",
    "bottleneck": "bottleneck",
    "placement": "placement",
    "optimizer": "optimizer",
}


def plan_notebook(name: str, values: Mapping[str, Any]) -> list[Plan]:
    """The plan of each stage of a notebook (02_lora) with these parameters; none if it has none.

    Examples are taken to be as long as they may be. PPO has the tuned model and the reward model
    in memory beside the policy and its reference.
    """
    model, own = values.get("model", "tinytown"), {k: v for k, v in values.items() if v != "auto"}
    common = {ours: own[theirs] for theirs, ours in NAMES.items() if theirs in own}
    common |= {"device": values.get("device", "auto")}
    if own.get("dtype") in ("bfloat16", "float16"):
        common["precision"] = "bf16"
    plans = []
    for technique in NOTEBOOKS.get(name.partition("_")[2], ()):
        extra: dict[str, Any] = {}
        if "minibatch_size" in values:
            size = values["minibatch_size"]
            extra = {"batch_size": min(16, size), "ranked": 4}
        if technique == "ppo":
            said = min(1.0, values["max_new_tokens"] / values["max_length"])
            held = sum(p.parts[WEIGHTS] for p in plans[-1:])
            extra = {
                "batch_size": size,
                "rank": values["lora_rank"],
                "response_share": said,
                "held": held,
            }
        plans.append(plan(model, technique, **common | extra))
    return plans


def check_fits(name: str, values: Mapping[str, Any]) -> None:
    """Raises ValueError, with the numbers and what would fit, for a stage that cannot fit.

    The embedded model fits wherever a notebook runs.
    """
    if values.get("model", "tinytown") == "tinytown":
        return
    try:
        plans = plan_notebook(name, values)
    except Exception as error:
        raise ValueError(
            f"{name}: its memory cannot be planned ({type(error).__name__}: {error}); "
            "--force runs it without a plan"
        ) from error
    for found in plans:
        if found.fits is False:
            raise ValueError(
                f"{name}, {found.title}. {found.advice} To run it all the same: --force"
            )
