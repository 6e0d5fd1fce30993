"""Bottleneck adapters: small trained layers with a residual, between frozen ones.

    h' = h + U f(D h + b) + c        D (m, d), U (d, m), m << d; at the start U = 0 and c = 0

Houlsby et al. (2019) put one after the attention and one after the MLP of each layer; Pfeiffer
et al. (2020) after the MLP only. Both act on what the sublayer gives, before it is added to the
residual stream, and train 2 d m + d + m numbers each. Since U is zero a model begins as itself;
the chapter leaves U random, which changes the model before it has learned anything. f stands
between two matrices, so unlike LoRA an adapter cannot be merged and costs time at inference.

`Bottleneck` is the method to read. No library has it, so the last section makes it a method of
PEFT, which then saves, loads, switches and trains it like its own. Whoever loads such an
adapter imports this module first. Left out: layer norms that train as well (Houlsby),
AdapterFusion, adapters in parallel to a sublayer.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
from peft import mapping
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

METHOD = "LABKIT_ADAPTER"  # the `peft_type` in a saved adapter's configuration
ACTIVATIONS = ("relu", "gelu", "silu")
PLACEMENTS = {"houlsby": ("attention", "mlp"), "pfeiffer": ("mlp",)}
NAMES = {
    "attention": ("self_attn", "attn", "attention", "self_attention"),
    "mlp": ("mlp", "feed_forward"),
}


@dataclass(frozen=True)
class AdapterConfig:
    """`bottleneck` m, the width inside an adapter; where adapters stand; `activation` f.

    `placement`: "houlsby" (after attention and MLP) or "pfeiffer" (after the MLP).
    `activation`: "relu", "gelu" or "silu".
    """

    bottleneck: int = 64
    placement: str = "houlsby"
    activation: str = "relu"

    def __post_init__(self) -> None:
        whole = isinstance(self.bottleneck, int) and not isinstance(self.bottleneck, bool)
        _require("bottleneck", self.bottleneck, whole and self.bottleneck >= 1,
                 "a whole number from 1")  # fmt: skip
        for name, known in (("placement", tuple(PLACEMENTS)), ("activation", ACTIVATIONS)):
            value = getattr(self, name)
            _require(name, value, value in known, f"one of {', '.join(known)}")


def _require(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


class Bottleneck(nn.Module):
    """h + U f(D h + b) + c, the identity until U has trained. Maps (…, width) to (…, width).

    D is (m, width), U is (width, m). They are made in float32 whatever h is: steps of 1/128, as
    of bfloat16, would swallow small updates. (Over a quantized base TRL's trainers round them.)
    """

    def __init__(self, width: int, config: AdapterConfig, device: Any = None) -> None:
        super().__init__()
        m = config.bottleneck

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device))

        self.activation = getattr(F, config.activation)
        self.D, self.b = zeros(m, width), zeros(m)
        self.U, self.c = zeros(width, m), zeros(width)
        nn.init.kaiming_uniform_(self.D, a=math.sqrt(5))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        inner = self.activation(F.linear(h.to(self.D.dtype), self.D, self.b))
        return h + F.linear(inner, self.U, self.c).to(h.dtype)


def parameters(width: int, layers: int, config: AdapterConfig) -> int:
    """How many numbers train in a model of this hidden width: 2 d m + d + m an adapter."""
    each = 2 * width * config.bottleneck + width + config.bottleneck
    return layers * len(PLACEMENTS[config.placement]) * each


def sublayers(model: Any, placement: str = "houlsby") -> dict[str, nn.Module]:
    """The modules that get an adapter behind them, by full name, lowest layer first.

    Raises ValueError for a model without a stack of layers that hold such modules.
    """
    depth = model.config.get_text_config().num_hidden_layers
    stacks = ((name, module) for name, module in model.named_modules()
              if isinstance(module, nn.ModuleList) and len(module) == depth)  # fmt: skip
    path, stack = next(stacks, ("", nn.ModuleList()))
    _require("model", type(model).__name__, len(stack) > 0, f"one with a list of {depth} layers")
    found = {}
    for number, layer in enumerate(stack):
        for kind in PLACEMENTS[placement]:
            children = [name for name, _ in layer.named_children()]
            child = next((n for n in NAMES[kind] if n in children), "")
            _require(f"model: {kind} of {type(layer).__name__}", children, bool(child),
                     f"a module called {' or '.join(NAMES[kind])}")  # fmt: skip
            found[f"{path}.{number}.{child}"] = layer.get_submodule(child)
    return found


def attach(model: Any, config: AdapterConfig, name: str = "default") -> Any:
    """`model` as a PEFT model with adapters; only they train.

    Given a model that `attach` returned, adds one more adapter called `name` to it, asleep until
    `set_adapter(name)`. Raises ValueError for adapters of another kind, or a name that is taken.
    """
    settings = BottleneckConfig(task_type="CAUSAL_LM", **asdict(config))
    present = getattr(model, "peft_config", {})
    others = [c.peft_type for c in present.values() if c.peft_type != METHOD]
    if others or (present and not isinstance(model, peft.PeftModel)):
        got = ", ".join(others) or "injected ones"
        raise ValueError(f"model: expected one without adapters or with bottleneck adapters, got "
                         f"one with {got}; load the model again")  # fmt: skip
    _require("name", name, name not in present, "a new adapter's name")
    with _without_renaming_warning():
        if not present:
            return peft.get_peft_model(model, settings, adapter_name=name)
        model.add_adapter(name, settings)
    return model


def restore(model: Any, folder: str | Path) -> Any:
    """`model` with the adapter that `models.save` or PEFT wrote to `folder`, in eval mode."""
    if not (Path(folder) / "adapter_config.json").is_file():
        raise FileNotFoundError(f"folder: expected a saved adapter (adapter_config.json), found "
                                f"none in {folder}")  # fmt: skip
    with _without_renaming_warning():
        return peft.PeftModel.from_pretrained(model, folder).eval()


@contextlib.contextmanager
def _without_renaming_warning() -> Iterator[None]:
    """PEFT asks the model for an attribute that transformers has renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        yield


# All that this room takes from PEFT's inside is below; `test_what_peft_keeps_inside` names it.


@dataclass
class BottleneckConfig(peft.PeftConfig):
    """`AdapterConfig` as PEFT stores it; `target_modules` None means those of `sublayers`."""

    bottleneck: int = 64
    placement: str = "houlsby"
    activation: str = "relu"
    target_modules: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = METHOD
        self.settings()

    def settings(self) -> AdapterConfig:
        return AdapterConfig(self.bottleneck, self.placement, self.activation)


class AdaptedLayer(nn.Module, BaseTunerLayer):
    """A frozen sublayer, `base_layer`, and the adapters behind it by name.

    What goes in is passed on; of a tuple that comes out, the first is the hidden state. Several
    active adapters work one after the other.
    """

    adapter_layer_names = ("bottleneck",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer, self.bottleneck = base_layer, nn.ModuleDict()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.base_layer(*args, **kwargs)
        if self.disable_adapters:
            return out
        h = out[0] if isinstance(out, tuple) else out
        for name in self.active_adapters:
            if name in self.bottleneck:
                h = self.bottleneck[name](h)
        return (h, *out[1:]) if isinstance(out, tuple) else h

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError("a bottleneck adapter cannot be merged: its activation stands "
                                  "between two matrices; unload() takes it off")  # fmt: skip


class BottleneckModel(BaseTuner):
    """Puts an `AdaptedLayer` around each of the model's `sublayers`."""

    prefix = "bottleneck"
    tuner_layer_cls = AdaptedLayer

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        return peft_config

    def _prepare_model(self, peft_config: BottleneckConfig, model: nn.Module) -> None:
        found = list(sublayers(model, peft_config.placement))
        peft_config.target_modules = peft_config.target_modules or found

    def _create_and_replace(
        self, peft_config: BottleneckConfig, adapter_name: str, target: nn.Module,
        target_name: str, parent: nn.Module, current_key: str,
    ) -> None:  # fmt: skip
        layer = target if isinstance(target, AdaptedLayer) else AdaptedLayer(target)
        width = self.model.config.get_text_config().hidden_size
        device = next(layer.base_layer.parameters()).device
        layer.bottleneck[adapter_name] = Bottleneck(width, peft_config.settings(), device)
        setattr(parent, target_name, layer)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        """PEFT's own expects linear layers and moves their weights; `unload` comes here."""
        setattr(parent, child_name, new_module)


def _register() -> None:
    """PEFT finds a method by its `peft_type` in three tables; its own are an enum of strings."""
    entries = {"CONFIG": BottleneckConfig, "TUNER": BottleneckModel, "PREFIX": "bottleneck"}
    for kind, entry in entries.items():
        table = getattr(mapping, f"PEFT_TYPE_TO_{kind}_MAPPING", None)
        if not isinstance(table, dict):
            raise ImportError(f"peft: expected the table PEFT_TYPE_TO_{kind}_MAPPING in "
                              f"peft.mapping, not in {peft.__version__}; use 0.21.2")  # fmt: skip
        table[METHOD] = entry


_register()
