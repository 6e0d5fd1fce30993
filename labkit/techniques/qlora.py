"""QLoRA: LoRA on a base whose weights are kept in four bits (Dettmers et al. 2023).

    h = Ŵ x + (alpha / r) B A x        Ŵ rebuilt from codes of 4 bits, A and B trained

The full weights are gone: Ŵ is made wherever it is used, forward and again backward, and thrown
away. What the codes are stands in `labkit.quantization`; `Linear4` and `inject` are the method
to read; `attach` hands the everyday work to bitsandbytes and PEFT and guards against what goes
wrong there. Left out: kernels that multiply without rebuilding Ŵ, weights of 8 bits, and saving
the base, which is quantized again to the same codes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from labkit import models
from labkit import quantization as q
from labkit.techniques import lora

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class QloraConfig:
    """`lora`: the adapter. `data_type`: "nf4", "fp4", or "int4", which only `inject` has.

    `block_size`: weights that share a constant. `double_quantization`: whether the constants
    are kept in 8 bits.
    """

    lora: lora.LoraConfig = lora.LoraConfig()
    data_type: str = "nf4"
    block_size: int = 64
    double_quantization: bool = True

    def __post_init__(self) -> None:
        _require("data_type", self.data_type, self.data_type in q.TABLES, f"one of {[*q.TABLES]}")
        known = self.block_size in BLOCK_SIZES
        _require("block_size", self.block_size, known, f"one of {BLOCK_SIZES}")

    @property
    def bits_per_weight(self) -> float:
        return q.bits_per_weight(self.block_size, self.double_quantization)


def _require(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


class Linear4(nn.Module):
    """A frozen linear layer in four bits, h = Ŵ x + b, made from an `nn.Linear` or a `Conv1D`.

    Maps (…, in) to (…, out). `weight` is Ŵ, (out, in), rebuilt at each reading.
    """

    def __init__(self, layer: nn.Module, config: QloraConfig) -> None:
        super().__init__()
        weight = _out_in(layer)
        self.shape, self.dtype, self.source_cls = weight.shape, weight.dtype, type(layer)
        self.table, self.block_size = q.TABLES[config.data_type](), config.block_size
        stored = q.store(weight, self.table, config.block_size, config.double_quantization)
        for name, tensor in stored._asdict().items():
            self.register_buffer(name, tensor)
        self.bias = layer.bias

    @property
    def weight(self) -> torch.Tensor:
        stored = q.Stored(self.packed, self.constants, self.second, self.mean)
        return q.rebuild(stored, self.shape, self.table, self.block_size).to(self.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = _Product.apply(x, self)
        return h if self.bias is None else h + self.bias


class _Product(torch.autograd.Function):
    """x Ŵᵀ. Autograd would keep Ŵ until the backward pass; this rebuilds it there."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Linear4) -> torch.Tensor:
        ctx.layer = layer
        return x @ layer.weight.to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ ctx.layer.weight.to(gradient.dtype), None


def _out_in(layer: nn.Module) -> torch.Tensor:
    weight = layer.weight.detach()
    return weight.T.contiguous() if isinstance(layer, Conv1D) else weight


def inject(model: nn.Module, config: QloraConfig) -> nn.Module:
    """From scratch, in place: all linear layers but the head in four bits, LoRA on the targets.

    `lora.lora_state` and `lora.swap` work on it. Raises the errors of `lora.inject`.
    """
    linear = lora.find_targets(model).values()
    model = lora.inject(model, config.lora)
    return _swap(model, {layer: Linear4(layer, config) for layer in linear})


def _swap(model: nn.Module, new: dict[nn.Module, nn.Module]) -> nn.Module:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in new:
                setattr(parent, name, new[child].train(child.training))
    return model


def quantize_model(model: Any, config: QloraConfig, device: str | None = None) -> Any:
    """All linear layers of `model` but the head in bitsandbytes' four bits, in place.

    Each weight is quantized on its way to `device` (by default it stays where it is), which so
    never holds the full model; computed is in the type that the weights had. A model that is in
    four bits already is checked instead. Raises ValueError for what bitsandbytes cannot do.
    """
    if any(_four_bit(model)):
        return _checked(model, config)
    expected = "nf4 or fp4, which bitsandbytes has (int4: inject)"
    _require("data_type", config.data_type, config.data_type != "int4", expected)
    linear = lora.find_targets(model)
    for name, layer in linear.items():
        place = torch.device(device or layer.weight.device)
        _check_width(name, lora.weight_shape(layer)[1], config.block_size, place)
    while linear:  # popped, so that the full weights are freed one by one
        _, layer = linear.popitem()
        _swap(model, {layer: _linear4bit(layer, config, device or layer.weight.device)})
    return model if device is None else model.to(device)


def _linear4bit(layer: nn.Module, config: QloraConfig, device: Any) -> nn.Module:
    import bitsandbytes as bnb

    out, width = lora.weight_shape(layer)
    with torch.device("meta"):
        new = bnb.nn.Linear4bit(width, out, bias=False, compute_dtype=layer.weight.dtype)
    weight = bnb.nn.Params4bit(
        _out_in(layer),
        blocksize=config.block_size,
        compress_statistics=config.double_quantization,
        quant_type=config.data_type,
        module=new,
    )
    new.weight, new.bias, new.source_cls = weight.to(device), layer.bias, type(layer)
    return _guarded(new)


def _guarded(layer: Any) -> Any:
    """Keeps bitsandbytes 0.50 from packing the weight anew in an evaluation with AVX512-BF16.

    That would round the constants, and give wrong gradients from then on.
    """
    layer.support_avx512bf16_for_cpu = False
    return layer


def _check_width(name: str, width: int, block_size: int, device: torch.device) -> None:
    """On a CPU bitsandbytes 0.50 rebuilds Ŵ wrongly where a block runs from row to row."""
    if device.type == "cpu" and width % block_size:
        fits = [size for size in BLOCK_SIZES if width % size == 0]
        raise ValueError(
            f"block_size: expected a divisor of {width}, the input width of {name!r}, got "
            f"{block_size}, with which bitsandbytes gives wrong weights on a CPU; "
            f"{f'use {max(fits)} or less' if fits else 'use a GPU'}"
        )


def _four_bit(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """bitsandbytes' layers by name, known without importing it."""
    return ((n, m) for n, m in model.named_modules() if hasattr(m, "support_avx512bf16_for_cpu"))


def _checked(model: Any, config: QloraConfig) -> Any:
    wanted = (config.data_type, config.block_size, config.double_quantization)
    for name, layer in _four_bit(model):
        weight = _guarded(layer).weight
        found = (weight.quant_type, weight.blocksize, weight.compress_statistics)
        _require(f"model: {name}", found, found == wanted, f"{wanted}, as in the settings")
        used = getattr(weight.quant_state, "packing_format_for_cpu", False)
        _require(f"model: {name}", "one packed for inference", not used, "weights as quantized")
        _check_width(name, layer.in_features, weight.blocksize, weight.device)
    return model


def load(
    model: str = "tinytown",
    config: QloraConfig | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    **options: Any,
) -> tuple[Any, Any]:
    """`models.load` into four bits: full weights pass through `device` one at a time.

    `dtype` is of all else and of the computation. If the file has it too, the host maps the
    weights from there and keeps no copy. Other options and errors as in `models.load`.
    """
    target = models._device(device)
    kind = str(models._dtype(dtype, target)).removeprefix("torch.")
    network, tokenizer = models.load(model, device="cpu", dtype=kind, **options)
    return quantize_model(network, config or QloraConfig(), target), tokenizer


def attach(model: Any, config: QloraConfig) -> Any:
    """`model` in four bits, in place, as a PEFT model with the adapters of `config.lora`.

    Takes a model of `models.load` or of `load`. Raises the errors of both steps.
    """
    lora.find_targets(model, config.lora.targets)
    with _marked(quantize_model(model, config)):
        return lora.attach(model, config.lora)


def restore(model: Any, folder: str | Path, config: QloraConfig) -> Any:
    """`model` in four bits with the adapter that `models.save` wrote to `folder`, in eval mode."""
    with _marked(quantize_model(model, config)):
        return lora.restore(model, folder)


@contextlib.contextmanager
def _marked(model: Any) -> Iterator[None]:
    """The mark that PEFT asks for. Left on, TRL would round the adapters to bfloat16."""
    model.is_loaded_in_4bit = True
    try:
        yield
    finally:
        del model.is_loaded_in_4bit


def dense(layer: Any) -> torch.Tensor:
    """Ŵ (out, in) of a layer in four bits, ours or bitsandbytes', in the type it had before.

    A plain layer gives its weight.
    """
    if not hasattr(layer.weight, "quant_state"):
        return _out_in(layer)
    state = layer.weight.quant_state
    nested = (state.state2.absmax, state.offset) if state.nested else ()
    stored = q.Stored(layer.weight.data, state.absmax, *nested)
    table = q.TABLES[state.quant_type]()
    return q.rebuild(stored, state.shape, table, state.blocksize).to(state.dtype)


@torch.no_grad()
def dequantize_model(model: Any) -> Any:
    """`model`, in place, with plain layers of weight Ŵ: it computes the same, at full size."""
    ours = [module for module in model.modules() if isinstance(module, Linear4)]
    layers = ours + [layer for _, layer in _four_bit(model)]
    for holder in (model, getattr(model, "config", model)):  # what transformers leaves there
        for mark in ("is_quantized", "quantization_method", "quantization_config", "hf_quantizer"):
            vars(holder).pop(mark, None)
    return _swap(model, {layer: _plain(layer, dense(layer)) for layer in layers})


def _plain(layer: Any, weight: torch.Tensor) -> nn.Module:
    (out, width), turned = weight.shape, getattr(layer, "source_cls", nn.Linear) is Conv1D
    with torch.device("meta"):
        new = Conv1D(out, width) if turned else nn.Linear(width, out, bias=False)
    new.weight = nn.Parameter(weight.T.contiguous() if turned else weight, requires_grad=False)
    new.bias = layer.bias
    return new


@torch.no_grad()
def merge(model: Any) -> Any:
    """`model` with W = Ŵ + scale · B A in plain layers, in the type that the weights had before.

    At full size: PEFT's own merge puts the sum back into four bits, which rounds it once more.
    The weights from before quantization would not do: the adapter was trained beside Ŵ.
    """
    if not hasattr(model, "get_base_model"):
        return lora.merge(dequantize_model(model))
    base, merged = model.get_base_model(), {}
    for wrapper in [module for module in base.modules() if hasattr(module, "get_delta_weight")]:
        layer = wrapper.get_base_layer()
        weight = dense(layer)
        updates = [wrapper.get_delta_weight(adapter) for adapter in wrapper.active_adapters]
        merged[wrapper] = _plain(layer, (weight + sum(updates)).to(weight.dtype))
    del base.peft_config  # left on, the model would pass for one with adapters
    return dequantize_model(_swap(base, merged))


def paged_optimizer(device: Any) -> tuple[str, str]:
    """The name for `TrainConfig.optimizer` that suits QLoRA on `device`, and why.

    A paged optimizer keeps its states in memory that the driver moves to the host while the GPU
    is full, so that a long batch slows training down where it would have ended it.
    """
    if torch.device(device).type == "cuda":
        return "paged_adamw_32bit", (
            "AdamW whose states may leave a full GPU for the host's memory; paged_adamw_8bit "
            "also keeps them in 8 bits"
        )
    return "adamw_torch_fused", (
        "without a GPU there is nothing to page out of; states in 8 bits run here (adamw_8bit), "
        "unpaged and slower"
    )
