"""What a notebook lets its reader turn: instant calculators, no training behind them.

Each is a pure function that computes, so that it can be tested and printed where no widget
runs, and a function that puts sliders in front of it.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

TARGETS = ("q, v", "q, k, v, o", "all linear layers")
MLP_RATIO = 11008 / 4096  # of Llama-2-7B: the width inside its MLP, in hidden widths


def explore(function: Callable[..., Any], **controls: Any) -> Any:
    """Controls above what `function(**values)` returns or displays, anew after each change.

    Like `ipywidgets.interactive`, but each output is handed over whole. That one streams it into
    the widget, and where a notebook runs without a browser the messages back to the kernel
    sometimes leave nbclient waiting forever (https://github.com/jupyter/nbclient/issues/312).
    """
    import ipywidgets as w

    def outputs() -> tuple[dict[str, Any], ...]:
        return _outputs(function, {name: control.value for name, control in controls.items()})

    view = w.Output(outputs=outputs())
    for control in controls.values():
        control.observe(lambda _: setattr(view, "outputs", outputs()), "value")
    return w.VBox([*controls.values(), view])


def _outputs(function: Callable[..., Any], values: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """What a call shows, in the notebook format's form."""
    from IPython.core.formatters import format_display_data
    from IPython.utils.capture import capture_output

    with capture_output() as caught:
        result = function(**values)
    shown = [(item.data, item.metadata or {}) for item in caught.outputs]
    if result is not None:
        shown.append(format_display_data(result))
    texts = {"stdout": caught.stdout, "stderr": caught.stderr}
    streams = [{"output_type": "stream", "name": n, "text": t} for n, t in texts.items() if t]
    return (*streams, *(_display(data, metadata) for data, metadata in shown))


def _display(data: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
    texts = {k: b64encode(v).decode() if isinstance(v, bytes) else v for k, v in data.items()}
    return {"output_type": "display_data", "data": texts, "metadata": metadata}


@dataclass(frozen=True)
class LoraCost:
    """Parameters of a LoRA adapter and of the model below it; file sizes in bytes."""

    trainable: int
    base: int

    @property
    def share(self) -> float:
        """Of all parameters, adapter included, as PEFT prints it (0–1)."""
        return self.trainable / (self.base + self.trainable)

    def file_bytes(self, bytes_each: int = 4) -> int:
        """The adapter's numbers on disk, without the file's header: 4 bytes each in float32."""
        return bytes_each * self.trainable


def lora_cost(
    rank: int, width: int, layers: int, targets: str = "q, v", *, vocabulary: int = 32_000
) -> LoraCost:
    """LoRA on a model shaped like Llama 2: hidden `width`, MLP 2.69 times as wide, untied head.

    A layer that maps k numbers to d gets rank · (d + k) parameters.
    """
    for name, value in {"rank": rank, "width": width, "layers": layers}.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if targets not in TARGETS:
        raise ValueError(
            f"targets: expected one of {', '.join(map(repr, TARGETS))}, got {targets!r}"
        )
    inner = round(MLP_RATIO * width)
    attention, mlp = [(width, width)] * 4, [(width, inner)] * 3
    shapes = {"q, v": attention[:2], "q, k, v, o": attention}.get(targets, attention + mlp)
    norms = (2 * layers + 1) * width
    base = layers * sum(d * k for d, k in attention + mlp) + 2 * vocabulary * width + norms
    return LoraCost(layers * sum(rank * (d + k) for d, k in shapes), base)


def lora_row(rank: int, width: int, layers: int, targets: str) -> dict[str, str]:
    """`lora_cost` as a row of a table, in units that people read."""
    cost = lora_cost(rank, width, layers, targets)
    return {
        "rank": str(rank),
        "width": f"{width:,}",
        "layers": str(layers),
        "targets": targets,
        "base parameters": f"{cost.base:,}",
        "trainable": f"{cost.trainable:,}",
        "share": f"{cost.share:.4%}",
        "file, float32": f"{cost.file_bytes() / 1e6:,.1f} MB",
        "file, bfloat16": f"{cost.file_bytes(2) / 1e6:,.1f} MB",
    }


def lora_calculator(rank: int = 8, width: int = 4096, layers: int = 32) -> Any:
    """Sliders for rank, width, depth and targets above the row that they give."""
    import ipywidgets as w

    from labkit.tracking import Table

    def show(rank: int, width: int, layers: int, targets: str) -> Table:
        return Table([lora_row(rank, width, layers, targets)])

    ranks = sorted({1, 2, 4, 8, 16, 32, 64, 128, 256, rank})
    return explore(
        show,
        rank=w.SelectionSlider(options=ranks, value=rank, description="rank"),
        width=w.IntSlider(value=width, min=256, max=8192, step=256, description="width"),
        layers=w.IntSlider(value=layers, min=2, max=80, description="layers"),
        targets=w.Dropdown(options=TARGETS, description="targets"),
    )


def memory_planner(model: Any = "tinytown", technique: str = "qlora", device_gb: float = 24) -> Any:
    """Controls for what a training run holds, above its plan: will it fit?

    The models are LLaMA's sizes and `model`, as `memory.plan` takes it. Shown are the parts at
    each moment of a step, the device's limit as a line, and what would fit if it does not.
    """
    import ipywidgets as w

    from labkit.memory import plan
    from labkit.memory.chapter import LLAMA, llama
    from labkit.memory.shapes import CHOICES

    own = getattr(getattr(model, "config", model), "name_or_path", "") or "your model"
    models = {f"LLaMA-{size}": llama(size) for size in LLAMA}
    models[model if isinstance(model, str) else own] = model

    def show(device_gb: float, **settings: Any) -> Any:
        try:
            return _drawn(plan(**settings, device_memory=device_gb * 1e9))
        except ValueError as error:
            print(error)

    powers = [2**k for k in range(13)]
    return explore(
        show,
        model=w.Dropdown(options=models, description="model"),
        technique=w.Dropdown(
            options=CHOICES["technique"], value=technique, description="technique"
        ),
        rank=w.SelectionSlider(options=powers[:9], value=16, description="rank"),
        optimizer=w.Dropdown(options=CHOICES["optimizer"], description="optimizer"),
        precision=w.Dropdown(options=("auto", *CHOICES["precision"]), description="precision"),
        batch_size=w.SelectionSlider(options=powers[:8], value=1, description="rows"),
        sequence_length=w.SelectionSlider(options=powers[6:], value=512, description="tokens"),
        gradient_checkpointing=w.Checkbox(value=True, description="checkpointing"),
        attention=w.Dropdown(options=CHOICES["attention"], description="attention"),
        device=w.Dropdown(options=CHOICES["device"], value="cuda", description="device"),
        device_gb=w.FloatLogSlider(value=device_gb, min=-1, max=3.2, step=0.05, description="GB"),
    )


def _drawn(plan: Any) -> Any:
    from IPython.display import display

    display(plan.figure())
    return plan
