"""What a training step needs, simulated: the project's own code runs on fake tensors.

Fake tensors have sizes and lifetimes but no content, and a ledger adds up what lives. At each point
of a step memory is linear in the number of equal blocks, so three and two of them tell. Left out:
several devices, sampling, gaps between the allocator's blocks. The plans are made in `memory`.
"""

from __future__ import annotations

import copy
import itertools
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers.pytorch_utils import Conv1D

from labkit import batching, models, training
from labkit.config import Count, Natural, NonNegative, Probability, settings
from labkit.techniques import adapter, lora, ppo, prefix, reward, rollout

PARTS = ("weights", "gradients", "optimizer states", "activations and rest", "runtime overhead")
WEIGHTS, GRADIENTS, STATES, REST, OVERHEAD = PARTS
RUNTIME = {"cpu": 550e6, "cuda": 600e6}  # bytes: Python and its libraries, measured; CUDA's context
WORKSPACE = {"cpu": 0, "cuda": 32 * 2**20}  # of cuBLAS, on Hopper
# bytes a weight; those of AdamW in torch have the type of the weights
STATE_BYTES = {"adamw_8bit": 2 + 8 / 256, "paged_adamw_8bit": 2 + 8 / 256}
STATE_BYTES |= {"paged_adamw_32bit": 8.0, "sgd": 0.0}


@settings
class Setting:
    """How labkit trains a model. `precision`: of weights and arithmetic; "mixed" has float32 weights.

    `response_share`: of the tokens. `rank` None is 8 for LoRA, all weights for PPO. `batch_size`
    counts PPO's minibatch, or rankings of `ranked` responses. `held`: bytes of other models.
    """

    technique: Literal["full", "lora", "qlora", "prefix", "adapter", "reward", "ppo"] = "lora"
    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["bf16", "mixed", "fp32"] = "mixed"
    optimizer: Literal["adamw_torch_fused", *STATE_BYTES] = "adamw_torch_fused"  # type: ignore
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
        if func is torch.ops.prim.device.default:  # two calls of three
            return args[0].fake_device
        out = func(*args, **(kwargs or {}))
        tensors = (leaf for leaf in tree_iter(out) if isinstance(leaf, Tensor))
        new = [t for t in tensors if t.untyped_storage()._cdata not in self.part]
        if new:
            self.label(new, REST)
        return out


class _Linear4bit(nn.Linear):
    """Stand-in for bitsandbytes' layer: 4.127 bits per weight (NF4, double quantization)."""

    def __init__(self, layer: Any) -> None:
        nn.Module.__init__(self)
        weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        (self.out_features, self.in_features), self.bias = weight.shape, layer.bias
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
            return nn.functional.linear(x, x.new_empty(ctx.shape))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ gradient.new_empty(ctx.shape), None


def _attached(network: Any, s: Setting) -> Any:
    """What a run trains of a causal language model on the meta device."""
    if s.technique == "reward":
        return reward.Scorer(reward.with_head(network, SimpleNamespace(pad_token_id=0)))
    if s.technique == "full" or (s.technique == "ppo" and not s.rank):
        model = network  # all of which trains
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
    if s.technique == "qlora" and s.device == "cuda" and s.precision != "fp32":
        for layer in model.modules():  # as PEFT's layer of four bits: its inputs are not copied
            layer.cast_input_dtype_enabled = False
    half = "fp32" if s.precision == "fp32" else "bf16"
    return rollout.PolicyWithValue(model, precision=half) if s.technique == "ppo" else model


def _faked(model: nn.Module) -> Iterator[Tensor]:
    """Makes parameters and buffers of a model on the meta device fake ones, as on a CPU."""
    fresh: dict[int, tuple[Tensor, Tensor]] = {}
    for own in itertools.chain(*((m._parameters, m._buffers) for m in model.modules())):
        for name, old in ((name, old) for name, old in own.items() if old is not None):
            new = torch.empty(old.shape, dtype=old.dtype)
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new, old.requires_grad)
            own[name] = fresh.setdefault(id(old), (new, old))[0]  # tied ones stay tied
    return (new for new, _ in fresh.values())


def _batch(s: Setting, mode: FakeTensorMode) -> Any:
    """Examples of equal length, packed where labkit packs."""
    ones: np.ndarray = np.ones(s.sequence_length, dtype=np.int64)
    mask = ones * (np.arange(len(ones), 0, -1) <= max(1, round((len(ones) - 1) * s.response_share)))
    examples: list[Any] = [batching.Example(ones, mask)] * s.batch_size
    collate: Any = batching.pack
    if s.technique == "reward":
        examples, collate = [examples[:1] * s.ranked] * s.batch_size, reward.pack_rankings
    batch = collate(examples, packing=s.technique != "prefix")
    tensors = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return replace(batch, **{name: mode.from_tensor(value) for name, value in tensors.items()})


def _loss(model: nn.Module, batch: Any, s: Setting) -> Tensor:
    if s.technique == "ppo":
        logp, values, _ = model(batch, 1.0)
        names = ("logp", "ref_logp", "values", "advantages", "returns")
        old = dict.fromkeys(names, torch.zeros_like(logp)) | {"mask": logp < 0}
        return ppo.losses(logp, values, old, ppo.PPOConfig())["loss"]
    loss: Any = reward.ranking_loss if s.technique == "reward" else training.sft_loss
    with torch.autocast("cpu", torch.bfloat16, enabled=s.precision != "fp32"):
        return loss(model, batch)[0]


def _step(model: Any, batch: Any, s: Setting, ledger: _Ledger) -> None:
    """The second step of a run: gradients and optimizer states are there."""
    trained, each = [p for p in model.parameters() if p.requires_grad], STATE_BYTES.get(s.optimizer)
    for p in trained:
        p.grad = torch.empty_like(p)
        p.register_post_accumulate_grad_hook(lambda p: ledger.label([p.grad], GRADIENTS))
    sizes = [2 * p.nbytes + 4 if each is None else int(p.numel() * each) for p in trained]
    states = [torch.empty(size, dtype=torch.uint8) for size in sizes]
    ledger.label(states, STATES)
    ledger.label([p.grad for p in trained], GRADIENTS)
    ledger.most.clear()
    if s.technique == "ppo":  # the last gradients are there until the next ones come
        ledger.begin("scoring")
        model.score(batch, 1.0)
    else:
        model.zero_grad()
    for _ in range(min(s.gradient_accumulation, 2)):
        ledger.begin("forward")
        loss = _loss(model, batch, s)
        if s.technique == "ppo":
            model.zero_grad()
        ledger.begin("loss")
        loss.backward()
        del loss
    ledger.begin("update")
    nn.utils.clip_grad_norm_(trained, 1.0)


def _phases(config: Any, depth: int, s: Setting) -> dict[str, Counter[str]]:
    """The parts of each phase of a step, at its most, in a model of `depth` blocks."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:depth]
    network = models.meta_model(config)
    network.to(torch.bfloat16 if s.precision == "bf16" else torch.float32)
    model = _attached(network, s)
    base = models.base_model(model.model if s.technique == "ppo" else model)
    if s.device == "cpu" and (s.precision != "fp32" or s.technique == "ppo"):
        models.use_float32_attention(base)
    if s.gradient_checkpointing:
        base.activation_checkpointing_enable()
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
    both = nn.ModuleList([model, network])  # a reward model is a copy, and the original stays
    blocks, ledger = [*models.blocks(base).values()], _Ledger()
    blocks[-1].register_full_backward_pre_hook(lambda *_: ledger.begin("last block"))
    blocks[0].register_full_backward_pre_hook(lambda *_: ledger.begin("first block"))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with warnings.catch_warnings(), mode, ledger:
        warnings.filterwarnings("ignore", "Full backward hook is firing")  # frozen inputs
        ledger.label(_faked(both.train(s.technique != "ppo")), WEIGHTS)
        _step(model, _batch(s, mode), s, ledger)
    return ledger.most


def depths(network: Any) -> tuple[int, ...]:
    """The numbers of blocks to simulate: three and two stand for many of one kind and size."""
    blocks = models.blocks(network).values()
    kinds = {*(getattr(network.config.get_text_config(), "layer_types", None) or ())}
    sizes = {tuple(p.numel() for p in block.parameters()) for block in blocks}
    alike = len(sizes) == 1 and len(kinds) < 2
    return (3, 2) if alike and len(blocks) > 3 else (len(blocks),)


_known: dict[Any, dict[str, float]] = {}  # a slider that comes back has its answer


def simulate(config: Any, s: Setting, depths: tuple[int, ...]) -> dict[str, float]:
    """The parts of a run at its most, bytes by name, from steps of models of `depths` blocks."""
    key = config.to_json_string(), s, depths
    if key not in _known:
        phases, *fewer = (_phases(config, depth, s) for depth in depths)
        added = config.get_text_config().num_hidden_layers - depths[0]
        for less in fewer:
            for phase, parts in phases.items():
                grown = {p: parts[p] + added * (parts[p] - less[phase][p]) for p in PARTS}
                phases[phase] = Counter(grown)
        most = max(phases.values(), key=Counter.total)
        more = {WEIGHTS: s.held, REST: WORKSPACE[s.device], OVERHEAD: RUNTIME[s.device]}
        _known[key] = {p: float(most[p] + more.get(p, 0)) for p in PARTS}
    return _known[key]
