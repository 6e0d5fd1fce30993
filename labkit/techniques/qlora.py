"""QLoRA: LoRA on a base whose weights are kept in four bits (Dettmers et al. 2023).

    h = Ŵ x + (alpha / r) B A x        Ŵ dequantized from codes of 4 bits, A and B trained

Ŵ is made wherever it is used, forward and again backward, and thrown away. `Linear4` and `inject`
are the method to read (the codes: `quantization`); `attach` is the same by bitsandbytes and PEFT,
and guards against what goes wrong there. Left out: experts that are 3-D parameters, saving the base.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from labkit import models
from labkit.config import settings
from labkit.techniques import lora
from labkit.techniques import quantization as q
from labkit.techniques.lora import LoraConfig

log = logging.getLogger("labkit")


@settings
class QloraConfig:
    """`data_type` "int4" is for `inject` only; with `double_quantization` scales have 8 bits."""

    lora: LoraConfig = LoraConfig()
    data_type: Literal["nf4", "fp4", "int4"] = "nf4"
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    double_quantization: bool = True


class Linear4(nn.Module):
    """A frozen linear layer in four bits, h = Ŵ x + b, made from an `nn.Linear` or a `Conv1D`.

    `weight` is Ŵ, (out, in), dequantized each time it is read.
    """

    def __init__(self, layer: nn.Module, config: QloraConfig) -> None:
        super().__init__()
        weight = lora.out_in(layer)
        self.shape, self.dtype, self.source_cls = weight.shape, weight.dtype, type(layer)
        self.table, self.block_size = q.TABLES[config.data_type], config.block_size
        stored = q.quantize(weight, self.table, config.block_size, config.double_quantization)
        for name, tensor in stored._asdict().items():
            self.register_buffer(name, tensor)
        self.bias = layer.bias

    @property
    def weight(self) -> torch.Tensor:
        stored = q.Quantized(self.packed, self.scales, self.second_scales, self.mean)
        return q.dequantize(stored, self.shape, self.table, self.block_size).to(self.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Checkpointed, since autograd would keep Ŵ; backward dequantizes again, and stops there.
        return checkpoint(self._product, x, use_reentrant=False, preserve_rng_state=False)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        h = x @ self.weight.to(x.dtype).T
        return h if self.bias is None else h + self.bias


def inject(model: nn.Module, config: QloraConfig) -> nn.Module:
    """From scratch, in place: all linear layers but the head in four bits, LoRA on the targets."""
    linear = lora.find_targets(model).values()
    model = lora.inject(model, config.lora)
    return lora.replace(model, {layer: Linear4(layer, config) for layer in linear})


def quantize_model(model: Any, config: QloraConfig, device: str | None = None) -> Any:
    """The layers of `lora.find_targets` in bitsandbytes' four bits, in place; the rest is logged.

    Each weight is quantized on its way to `device` (by default its own), which so never holds the
    full model. A model in four bits already is checked. Raises ValueError for what cannot be done.
    """
    if config.data_type == "int4":
        raise ValueError("data_type: expected nf4 or fp4, which bitsandbytes has, got 'int4'")
    options: dict[str, Any] = {"quant_type": config.data_type, "blocksize": config.block_size}
    options["compress_statistics"] = config.double_quantization
    present = _four_bit(model)
    linear = present or lora.find_targets(model)
    for name, layer in linear.items():
        width = layer.nx if isinstance(layer, Conv1D) else layer.in_features
        on_cpu = torch.device(device or layer.weight.device).type == "cpu"
        if on_cpu and width % config.block_size:  # bitsandbytes 0.50 gives wrong weights there
            raise ValueError(f"block_size: expected a divisor of {width}, the width of {name!r}")
    if not present:
        _log_coverage(model, linear)
        while linear:  # popped, so that the full weights are freed one by one
            layer = linear.popitem()[1]
            lora.replace(model, {layer: _linear4bit(layer, options, device or layer.weight.device)})
    for name, layer in _four_bit(model).items():
        # On AVX512-BF16, bitsandbytes 0.50 would pack the weights anew in an evaluation, which
        # rounds the scales and gives wrong gradients.
        layer.support_avx512bf16_for_cpu = False
        packed = getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
        found = {option: getattr(layer.weight, option) for option in options}
        if packed or found != options:
            raise ValueError(f"model: {name}: expected {options}, got {found}, packed: {packed}")
    return model if device is None else model.to(device)


def _log_coverage(model: Any, linear: dict[str, Any]) -> None:
    """A warning if other matrices than embeddings and head stay in full precision."""
    covered = {layer.weight: layer.weight.numel() for layer in linear.values()}
    share = sum(covered.values()) / models.parameter_counts(model).total
    left = {p: name for name, p in model.named_parameters() if p.ndim > 1 and p not in covered}
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    head = getattr(model, "get_output_embeddings", lambda: None)()  # a single block has none
    usual = {layer.weight for layer in (*embeddings, head) if layer is not None}
    names = ", ".join(sorted({re.sub(r"\.\d+\.", ".*.", name) for name in left.values()}))
    level = logging.WARNING if left.keys() - usual else logging.INFO
    log.log(level, "qlora: %.1f %% of the weights in four bits; not %s", 100 * share, names)


def _linear4bit(layer: nn.Module, options: dict[str, Any], device: Any) -> nn.Module:
    import bitsandbytes as bnb

    weight = lora.out_in(layer).detach().contiguous()
    out, width = weight.shape
    with torch.device("meta"):
        new = bnb.nn.Linear4bit(width, out, bias=False, compute_dtype=weight.dtype)
    new.weight = bnb.nn.Params4bit(weight, module=new, **options).to(device)
    new.bias, new.source_cls = layer.bias, type(layer)
    return new


def _four_bit(model: nn.Module) -> dict[str, Any]:
    """bitsandbytes' layers by name, recognized without importing it."""
    found = model.named_modules()
    return {name: m for name, m in found if hasattr(m, "support_avx512bf16_for_cpu")}


def load(
    model: str, config: QloraConfig, *, device: str = "auto", dtype: str = "auto", **options: Any
) -> tuple[Any, Any]:
    """`models.load` into four bits; `dtype` is of all else and of the computation."""
    target = models.find_device(device)
    if dtype == "auto":  # nothing of it trains, so half precision costs nothing
        half = target.startswith("cuda") and torch.cuda.is_bf16_supported()
        dtype = "bfloat16" if half else "float32"
    network, tokenizer = models.load(model, device="cpu", dtype=dtype, **options)
    return quantize_model(network, config, target), tokenizer


def attach(model: Any, config: QloraConfig) -> Any:
    """`model` (of `models.load` or `load`) in four bits, in place, with PEFT's LoRA on top."""
    lora.find_targets(model, config.lora.targets)
    with _marked(quantize_model(model, config)):
        return lora.attach(model, config.lora)


def load_adapter(model: Any, folder: str | Path, config: QloraConfig) -> Any:
    """`model` in four bits with the adapter that `models.save` wrote to `folder`, in eval mode."""
    with _marked(quantize_model(model, config)):
        return models.load_adapter(model, folder)


@contextlib.contextmanager
def _marked(model: Any) -> Iterator[None]:
    """The mark that PEFT asks for. Left on, TRL would round the adapters to bfloat16."""
    model.is_loaded_in_4bit = True
    try:
        yield
    finally:
        del model.is_loaded_in_4bit


@torch.no_grad()
def dequantize_model(model: Any) -> Any:
    """`model`, in place, with plain layers of weight Ŵ: it computes the same, at full size."""
    for holder in (model, getattr(model, "config", model)):  # what transformers leaves there
        for mark in ("is_quantized", "quantization_method", "quantization_config", "hf_quantizer"):
            vars(holder).pop(mark, None)
    ours = [module for module in model.modules() if isinstance(module, Linear4)]
    return lora.replace(model, {m: _plain(m) for m in (*ours, *_four_bit(model).values())})


def _plain(layer: Any) -> nn.Module:
    """The layer of weight Ŵ that a layer in four bits was before, in its own type."""
    weight, state = layer.weight, getattr(layer.weight, "quant_state", None)
    if state is not None:
        nested = (state.state2.absmax, state.offset) if state.nested else ()
        stored, table = q.Quantized(weight.data, state.absmax, *nested), q.TABLES[state.quant_type]
        weight = q.dequantize(stored, state.shape, table, state.blocksize).to(state.dtype)
    (out, width), transposed = weight.shape, getattr(layer, "source_cls", None) is Conv1D
    with torch.device("meta"):
        new = Conv1D(out, width) if transposed else nn.Linear(width, out, bias=False)
    new.weight = nn.Parameter(weight.T.contiguous() if transposed else weight, requires_grad=False)
    new.bias = layer.bias
    return new


@torch.no_grad()
def merge(model: Any) -> Any:
    """`model` with W = Ŵ + scale · B A in plain layers, in the type that the weights had before.

    PEFT's own merge would round the sum to four bits again; the weights from before quantization
    are not those that the adapter was trained on. Raises ValueError, with nothing merged, for inf
    or NaN in the model.
    """
    if not all(p.isfinite().all() for p in model.parameters()):
        raise ValueError("model: expected finite weights and adapters, got inf or NaN")
    if not hasattr(model, "get_base_model"):
        return lora.merge(dequantize_model(model))
    base = dequantize_model(model.get_base_model())
    wrappers = [module for module in base.modules() if hasattr(module, "get_delta_weight")]
    for wrapper in wrappers:
        weight = lora.out_in(wrapper.get_base_layer())
        for name in wrapper.active_adapters:
            weight.add_(wrapper.get_delta_weight(name))
    del base.peft_config  # left on, the model would pass for one with adapters
    return lora.replace(base, {wrapper: wrapper.get_base_layer() for wrapper in wrappers})
