"""A model's shape, from its configuration alone, wherever that is.

The network is built on the meta device, where it has no weights. Known are dense decoders whose
blocks are alike: Llama, Mistral, Qwen, Gemma, GPT-2 and their kin.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from labkit import hub, models
from labkit.memory.shapes import Shape


def read(model: Any) -> tuple[str, Shape]:
    """A name to show, and the shape, of what `planner.plan` takes for a model."""
    if hasattr(model, "peft_config"):
        raise ValueError("model: expected one without adapters, got one that has them; "
                         "give its configuration, model.config")  # fmt: skip
    config = getattr(model, "config", model)
    if isinstance(config, str | Path):
        name = str(config)
        network = models.meta_model(_folder(name))
    else:
        network = models.meta_model(config)
        name = f"{getattr(network.config, 'name_or_path', '') or network.config.model_type}"
    shape = shape_of(network)
    count = shape.parameters
    size = f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"
    return f"{name}, {size} parameters", shape


def _folder(model: str) -> Path:
    """Where the configuration is: here, or fetched from the hub, it alone."""
    if model == "tinytown":
        from labkit import tinytown

        return Path(tinytown.base_folder())
    folder = Path(model).expanduser()
    if folder.exists():
        return folder
    from huggingface_hub import hf_hub_download

    try:
        with hub.bounded_patience():
            return Path(hf_hub_download(model, "config.json"))
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0] if lines else ''}"
        raise FileNotFoundError(
            f"model: expected a folder, or a hub id whose configuration can be had, got {model!r} "
            f"({reason}); check the spelling and the network, or give a configuration as a dict"
        ) from error


def shape_of(network: Any) -> Shape:
    """The shape of a causal language model of transformers.

    Raises ValueError for a mixture of experts, or a model without a list of blocks.
    """
    config = network.config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    queries, keys = heads * size, (getattr(config, "num_key_value_heads", None) or heads) * size
    block = _block(network, config.num_hidden_layers)
    linear = _linear(block)
    inner = max(width for _, _, width in linear)
    norms = {n: m for n, m in block.named_modules() if getattr(_weight(m), "ndim", 0) == 1}
    embedding = network.get_input_embeddings().weight
    gated = sum(out for _, out, _ in linear if out % inner == 0) > inner
    return Shape(
        parameters=sum(p.numel() for p in network.parameters()),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        vocabulary=embedding.shape[0],
        tied=network.get_output_embeddings().weight is embedding,
        heads=heads,
        queries=queries,
        keys=keys,
        inner=inner,
        gated=gated,
        inner_kept=3 if gated else 4 if _in_python(block) else 1,
        linear=linear,
        norms=tuple(_norm_width(n, m, config.hidden_size, queries, keys) for n, m in norms.items()),
        python_norms=any(type(m).__name__ != "LayerNorm" for m in norms.values()),
    )


def _block(network: Any, layers: int) -> Any:
    from torch import nn

    lists = (m for m in network.modules() if isinstance(m, nn.ModuleList) and len(m) == layers)
    block = next((blocks[0] for blocks in lists), None)
    if block is None or any(p.ndim > 2 for p in block.parameters()):
        raise ValueError(f"model: expected a dense decoder with a list of {layers} blocks, got "
                         f"{type(network).__name__}, which the planner does not know")  # fmt: skip
    return block


def _in_python(block: Any) -> bool:
    """Whether the activation is a formula of torch operations, each of which keeps something."""
    formulas = ("NewGELUActivation", "FastGELUActivation")
    return any(type(module).__name__ in formulas for module in block.modules())


def _linear(block: Any) -> tuple[tuple[str, int, int], ...]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    found = []
    for name, layer in block.named_modules():
        if isinstance(layer, nn.Linear | Conv1D):
            out, width = layer.weight.shape
            found.append((name, width, out) if isinstance(layer, Conv1D) else (name, out, width))
    return tuple(found)


def _weight(module: Any) -> Any:
    return module._parameters.get("weight")


def _norm_width(name: str, module: Any, hidden: int, queries: int, keys: int) -> int:
    """Norms of queries and keys repeat a weight of one head's size over all heads."""
    if _weight(module).numel() == hidden:
        return hidden
    return keys if "k_norm" in name else queries
