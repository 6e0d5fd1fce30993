"""Bottleneck adapters: small trained layers with a residual, between frozen ones.

    h' = h + U f(D h + b) + c        D (m, d), U (d, m), m << d; at the start U = 0 and c = 0

Houlsby et al. (2019) put one after the attention and one after the MLP of each layer, Pfeiffer et
al. (2020) after the MLP only; both before the sum with the residual stream. f stands between two
matrices, so an adapter cannot be merged and costs inference time. `Bottleneck` is the method to
read. The last section makes it a method of PEFT, which saves, loads and switches it like its own
once this module is imported. Left out: layer norms that train as well (Houlsby), AdapterFusion.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import peft
import torch
import torch.nn.functional as F
from peft.tuners import tuners_utils
from torch import nn

from labkit import models
from labkit.config import Count, settings

METHOD = "LABKIT_ADAPTER"  # the `peft_type` in a saved adapter's configuration
ATTENTION, MLP = ("self_attn", "attn", "attention", "self_attention"), ("mlp", "feed_forward")
PLACEMENTS = {"houlsby": (ATTENTION, MLP), "pfeiffer": (MLP,)}  # by the names of sublayers


@settings
class AdapterConfig:
    """`bottleneck` m, the width inside; `placement`, after which sublayers; `activation` f."""

    bottleneck: Count = 64
    placement: Literal["houlsby", "pfeiffer"] = "houlsby"
    activation: Literal["relu", "gelu", "silu"] = "relu"


class Bottleneck(nn.Module):
    """h + U f(D h + b) + c, the identity until U has trained. Maps (…, width) to (…, width).

    D is (m, width), U is (width, m). They are float32 whatever h is: steps of 1/128, as of
    bfloat16, would swallow small updates.
    """

    def __init__(self, width: int, config: AdapterConfig, device: Any = None) -> None:
        super().__init__()
        m, kind = config.bottleneck, {"dtype": torch.float32, "device": device}
        self.activation = getattr(F, config.activation)
        self.D, self.b = (nn.Parameter(torch.zeros(s, **kind)) for s in ((m, width), (m,)))
        self.U, self.c = (nn.Parameter(torch.zeros(s, **kind)) for s in ((width, m), (width,)))
        nn.init.kaiming_uniform_(self.D, a=math.sqrt(5))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        inner = self.activation(F.linear(h.to(self.D.dtype), self.D, self.b))
        return h + F.linear(inner, self.U, self.c).to(h.dtype)


def parameters(width: int, layers: int, config: AdapterConfig) -> int:
    """How many numbers train in a model of this hidden width: 2 d m + d + m per adapter."""
    each = 2 * width * config.bottleneck + width + config.bottleneck
    return layers * len(PLACEMENTS[config.placement]) * each


def sublayers(model: Any, placement: str = "houlsby") -> dict[str, nn.Module]:
    """The modules that get an adapter behind them, by full name, lowest layer first."""
    found = {}
    for path, block in models.blocks(model).items():
        for names in PLACEMENTS[placement]:
            name = next((name for name in names if hasattr(block, name)), None)
            if name is None:
                raise ValueError(f"model: expected one of {names} in {path}, got none")
            found[f"{path}.{name}"] = getattr(block, name)
    return found


def attach(model: Any, config: AdapterConfig, name: str = "default") -> Any:
    """`model` as a PEFT model with adapters; only they train.

    A model that `attach` returned gets one more, called `name`, inactive until `set_adapter(name)`.
    """
    peft_config = BottleneckConfig(task_type="CAUSAL_LM", **asdict(config))
    present = getattr(model, "peft_config", {})
    ours = isinstance(model, peft.PeftModel) and model.peft_type == METHOD
    if present and not ours or name in present:
        raise ValueError(f"model: expected no adapters, or other ones of attach than {name!r}")
    with models.quiet_peft():
        if not present:
            return peft.get_peft_model(model, peft_config, adapter_name=name)
        model.add_adapter(name, peft_config)
    return model


# All uses of PEFT's internals are below; `test_what_peft_keeps_inside` names them.


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
        return AdapterConfig(**{f.name: getattr(self, f.name) for f in fields(AdapterConfig)})


class AdaptedLayer(nn.Module, tuners_utils.BaseTunerLayer):
    """A frozen sublayer, `base_layer`, and the adapters behind it by name, the active ones in turn."""

    adapter_layer_names = ("bottleneck",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer, self.bottleneck = base_layer, nn.ModuleDict()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.base_layer(*args, **kwargs)
        h = out[0] if isinstance(out, tuple) else out  # the first is the hidden state
        for name in () if self.disable_adapters else self.active_adapters:
            if name in self.bottleneck:
                h = self.bottleneck[name](h)
        return (h, *out[1:]) if isinstance(out, tuple) else h

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError("no merge of a bottleneck: f stands between two matrices")


class BottleneckModel(tuners_utils.BaseTuner):
    prefix = "bottleneck"
    tuner_layer_cls = AdaptedLayer

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        return peft_config

    def _prepare_model(self, peft_config: BottleneckConfig, model: nn.Module) -> None:
        if not peft_config.target_modules:
            peft_config.target_modules = list(sublayers(model, peft_config.placement))

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, **_):
        layer = target if isinstance(target, AdaptedLayer) else AdaptedLayer(target)
        width = self.model.config.get_text_config().hidden_size
        device = next(layer.base_layer.parameters()).device
        layer.bottleneck[adapter_name] = Bottleneck(width, peft_config.settings(), device)
        setattr(parent, target_name, layer)

    def _replace_module(self, parent: Any, child_name: str, new_module: Any, child: Any) -> None:
        """PEFT's own expects linear layers and moves their weights; `unload` comes here."""
        setattr(parent, child_name, new_module)


# PEFT finds a method by its `peft_type` in three tables; its own are an enum of strings.
peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[METHOD] = BottleneckConfig
peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[METHOD] = BottleneckModel
peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[METHOD] = "bottleneck"
