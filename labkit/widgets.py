"""What a notebook lets its reader turn: instant calculators, no training behind them."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from typing import Any

import ipywidgets as w
from IPython.core.formatters import format_display_data
from IPython.utils.capture import capture_output

from labkit.show import Table

TARGETS = ("q, v", "q, k, v, o", "all linear layers")
MLP_RATIO = 11008 / 4096  # of Llama-2-7B: the width inside its MLP, in hidden widths


def explore(function: Callable[..., Any], **controls: Any) -> Any:
    """Controls above what `function(**values)` returns or displays, anew after each change.

    Like `ipywidgets.interactive`, which streams its output: without a browser that sometimes
    leaves nbclient waiting forever (https://github.com/jupyter/nbclient/issues/312).
    """
    view = w.Output()

    def update(_: Any = None) -> None:
        with capture_output() as caught:
            result = function(**{name: control.value for name, control in controls.items()})
        texts = {"stdout": caught.stdout, "stderr": caught.stderr}
        outputs = [{"output_type": "stream", "name": n, "text": t} for n, t in texts.items() if t]
        shown = [(each.data, each.metadata or {}) for each in caught.outputs]
        for data, metadata in shown + ([] if result is None else [format_display_data(result)]):
            for kind in (kind for kind, value in data.items() if isinstance(value, bytes)):
                data = data | {kind: b64encode(data[kind]).decode()}
            outputs.append({"output_type": "display_data", "data": data, "metadata": metadata})
        view.outputs = tuple(outputs)

    update()
    for control in controls.values():
        control.observe(update, "value")
    return w.VBox([*controls.values(), view])


def lora_row(rank: int, width: int, layers: int, targets: str = "q, v") -> dict[str, str]:
    """What LoRA costs on a model shaped like Llama 2, of 32,000 tokens and an untied head.

    A layer that maps k numbers to d gets rank · (d + k) parameters. The share is of all
    parameters, adapter included, as PEFT prints it.
    """
    inner = round(MLP_RATIO * width)
    attention, mlp = [(width, width)] * 4, [(width, inner)] * 3
    shapes = dict(zip(TARGETS, (attention[:2], attention, attention + mlp), strict=True))[targets]
    base = layers * sum(d * k for d, k in attention + mlp) + (2 * 32_000 + 2 * layers + 1) * width
    trainable = layers * sum(rank * (d + k) for d, k in shapes)
    return {
        "rank": str(rank),
        "width": f"{width:,}",
        "layers": str(layers),
        "targets": targets,
        "base parameters": f"{base:,}",
        "trainable": f"{trainable:,}",
        "share": f"{trainable / (base + trainable):.4%}",
        "file, float32": f"{4 * trainable / 1e6:,.1f} MB",
        "file, bfloat16": f"{2 * trainable / 1e6:,.1f} MB",
    }


def lora_calculator(rank: int = 8, width: int = 4096, layers: int = 32) -> Any:
    """Sliders for rank, width, depth and targets above the row that they give."""
    ranks = sorted({*(2**k for k in range(9)), rank})
    return explore(
        lambda **values: Table([lora_row(**values)]),
        rank=w.SelectionSlider(options=ranks, value=rank, description="rank"),
        width=w.IntSlider(value=width, min=256, max=8192, step=256, description="width"),
        layers=w.IntSlider(value=layers, min=2, max=80, description="layers"),
        targets=w.Dropdown(options=TARGETS, description="targets"),
    )
