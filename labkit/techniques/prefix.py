"""Prefix tuning: a frozen model attends to trained keys and values as well (Li and Liang 2021).

In every layer and head, P_K and P_V come before the keys and values of the text:

    h = softmax(q [P_K; K]ᵀ / √d) [P_V; V]        P_K and P_V (length, d) trained, all else frozen

They enter through the KV cache, as if `length` tokens had been read before. An MLP can make them
from a smaller table while they train, and is thrown away afterwards. `Prefix`, `keys_values` and
`forward` are the method to read; `attach` is the same by PEFT. Left out: layers whose keys and
values differ in shape. Under a sliding window a long text leaves the prefix behind.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import DynamicCache

from labkit import models
from labkit.config import Count, Natural, settings
from labkit.logprobs import evaluating


@settings
class PrefixConfig:
    """`length` of the prefix in tokens; `hidden` width of the MLP that makes it, 0 for none."""

    length: Count = 20
    hidden: Natural = 0


class Shape(NamedTuple):
    """What a model's KV cache holds per token: keys and values of `heads` in each layer."""

    layers: int
    heads: int
    head_dim: int

    @property
    def numbers(self) -> int:
        return self.layers * 2 * self.heads * self.head_dim


def kv_shape(config: Any) -> Shape:
    """The shape for a model's configuration; key heads may be fewer than query heads."""
    config = config.get_text_config()
    queries = getattr(config, "num_attention_heads", 0)
    if not queries:
        raise ValueError(f"model: expected attention, got a {config.model_type}; no prefix for it")
    heads = getattr(config, "num_key_value_heads", None) or queries
    if getattr(config, "multi_query", False):  # Falcon's later kind caches all heads again
        heads = queries if getattr(config, "new_decoder_architecture", False) else 1
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // queries
    return Shape(config.num_hidden_layers, heads, head_dim)


class Prefix(nn.Module):
    """Trained rows of keys and values, one per prefix token: (length, layers · 2 · heads · head_dim).

    With `hidden`, they are W2 tanh(W1 table + b1) + b2, table (length, heads · head_dim).
    """

    def __init__(self, shape: Shape, config: PrefixConfig) -> None:
        super().__init__()
        self.shape = shape
        width = shape.heads * shape.head_dim if config.hidden else shape.numbers
        self.table = nn.Parameter(torch.randn(config.length, width))
        self.mlp: nn.Module = nn.Identity()
        if config.hidden:
            first, last = nn.Linear(width, config.hidden), nn.Linear(config.hidden, shape.numbers)
            self.mlp = nn.Sequential(first, nn.Tanh(), last)

    def forward(self) -> torch.Tensor:
        return self.mlp(self.table)


def keys_values(rows: torch.Tensor, shape: Shape) -> torch.Tensor:
    """(length, layers · 2 · heads · head_dim) as (layers, 2, heads, length, head_dim)."""
    return rows.view(len(rows), shape.layers, 2, shape.heads, shape.head_dim).permute(1, 2, 3, 0, 4)


def cache(rows: torch.Tensor, shape: Shape, batch: int) -> DynamicCache:
    """The KV cache of a model that has read the prefix, the same for each of `batch` examples."""
    filled = DynamicCache()
    for layer, pair in enumerate(keys_values(rows, shape)):
        filled.update(*pair[:, None].expand(-1, batch, -1, -1, -1), layer)
    return filled


def forward(model: nn.Module, prefix: Prefix, input_ids: torch.Tensor, **inputs: Any) -> Any:
    """What `model` gives for `input_ids` (B, T), padded on the right, after the prefix.

    An `attention_mask` (B, T) is the text's. Logits come for the T tokens of the text only.
    """
    rows = prefix().to(model.dtype)
    if (mask := inputs.get("attention_mask")) is not None:
        seen = mask.new_ones(len(input_ids), len(rows))
        inputs["attention_mask"] = torch.cat([seen, mask], dim=1)
    past = cache(rows, prefix.shape, len(input_ids))
    return model(input_ids=input_ids, past_key_values=past, **inputs)


@torch.no_grad()
def text_rows(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Keys and values of a real text, ids (length,), as rows: the model answers as if it read it."""
    past = model(input_ids=ids[None].to(model.device), use_cache=True).past_key_values
    if (window := min(layer.keys.shape[2] for layer in past.layers)) < len(ids):
        raise ValueError(
            f"text: expected at most {window} tokens, the sliding window, got {len(ids)}"
        )
    layers = [torch.stack([layer.keys[0], layer.values[0]]) for layer in past.layers]
    return torch.stack(layers).permute(3, 0, 1, 2, 4).flatten(1)


def parameters(shape: Shape, config: PrefixConfig) -> int:
    """How many numbers train: length · 2 · layers · heads · head_dim, or table and MLP."""
    with torch.device("meta"):
        return sum(p.numel() for p in Prefix(shape, config).parameters())


def cache_bytes(shape: Shape, tokens: int, batch: int = 1, bytes_each: int = 4) -> int:
    """Memory of the KV cache for so many tokens of prefix or text, 4 bytes each in float32."""
    return batch * tokens * shape.numbers * bytes_each


def attach(model: Any, config: PrefixConfig, text: torch.Tensor | None = None) -> Any:
    """`model` as a PEFT model with a prefix; nothing else trains.

    `text`, ids (length,), is the text to start from if there is no MLP, see `text_rows`. Raises
    ValueError for a model with adapters or a cache other than `kv_shape`, and for gradient
    checkpointing, also later. With an MLP training cannot be resumed: checkpoints keep rows only.
    """
    import peft

    if hasattr(model, "peft_config"):
        raise ValueError("model: expected no adapters, got some; merge them, or load it again")
    if model.is_activation_checkpointing:
        _refuse_checkpointing()
    shape = kv_shape(model.config)
    _check_cache(model, shape)
    peft_config = peft.PrefixTuningConfig(
        num_virtual_tokens=config.length,
        num_layers=shape.layers,
        num_attention_heads=shape.heads,
        token_dim=shape.heads * shape.head_dim,
        prefix_projection=config.hidden > 0,
        encoder_hidden_size=config.hidden or None,
        task_type="CAUSAL_LM",
    )
    with models.quiet_peft():
        tuned = peft.get_peft_model(model, peft_config)
    if text is not None:
        tuned.prompt_encoder["default"].load_prompt_embeddings(text_rows(model, text))
    return _guard(tuned)


@torch.no_grad()
def _check_cache(model: Any, shape: Shape) -> None:
    """Refuses a model that cannot go on from such a cache, tried: state-space layers have another."""
    if model.device.type == "meta":
        return
    reason: object = "it adds nothing to keys and values"
    rows = torch.zeros(1, shape.numbers, dtype=model.dtype, device=model.device)
    ids, past = rows[:, :1].long(), cache(rows, shape, 1)
    try:
        with evaluating(model):
            model(input_ids=ids, past_key_values=past, use_cache=True)
        if past.get_seq_length() == 2:
            return
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        reason = error
    raise ValueError(f"model: a prefix does not fit a {type(model).__name__}: {reason}")


def _guard(tuned: Any) -> Any:
    """TRL switches gradient checkpointing on by default, long after `attach`."""
    tuned.get_base_model().activation_checkpointing_enable = _refuse_checkpointing
    return tuned


def _refuse_checkpointing(*args: Any, **kwargs: Any) -> None:
    raise ValueError("gradient_checkpointing: a layer computed again would miss the prefix")


def load_adapter(model: Any, folder: str | Path) -> Any:
    """`models.load_adapter` for a prefix; only keys and values were saved, so it has no MLP."""
    tuned = _guard(models.load_adapter(model, folder))
    made: Any = tuned.active_peft_config
    heads = made.num_attention_heads
    _check_cache(tuned.get_base_model(), Shape(made.num_layers, heads, made.token_dim // heads))
    return tuned
