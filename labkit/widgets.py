"""What a notebook lets its reader turn: calculators and questions, no training behind them.

A widget lives only where its kernel does. So each stands with a copy of what it first showed, which
browsers hide beside the live one: it is what GitHub, nbviewer, nbconvert and a reopened file show.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import ipywidgets as w
from IPython.core.formatters import format_display_data
from IPython.display import display
from IPython.utils.capture import capture_output

from labkit.show import SideBySide, Table

TARGETS = ("q, v", "q, k, v, o", "all linear layers")
MLP_RATIO = 11008 / 4096  # of Llama-2-7B: the width inside its MLP, in hidden widths


class Explorer(w.VBox):
    """Controls above an `Output`; shows itself with the copy."""

    def _ipython_display_(self, **_: Any) -> None:
        *controls, view = self.children
        name = f"labkit-{self.model_id[:8]}"
        self.add_class(name)
        values = [f"{c.description} = {getattr(c, 'label', None) or c.value}" for c in controls]
        caption = f"{', '.join(values)} (run the cell to change them)"
        display(self._repr_mimebundle_() | {"text/plain": caption}, raw=True)
        # JupyterLab says "model not found" in place of a widget whose kernel is gone.
        gone = f".jp-OutputArea-child:has(~ * .{name}-copy) [data-mime-type*=widget]:not(:has(*))"
        hidden = f"body:has(.{name}) .{name}-copy{{display:none}}{gone}{{display:none}}"
        hidden += ".labkit-busy{opacity:.4}"
        start = f'<div class="{name}-copy"><style>{hidden}</style>'
        first = {"data": {"text/html": f"<p>{escape(caption)}</p>"}}
        for output in [first, *view.outputs]:
            data, about = output.get("data", output), output.get("metadata", {})
            page = data.get("text/html")
            if png := data.get("image/png"):
                shape = about.get("image/png", {}).items()  # alt, width, height
                shape = " ".join(f'{name}="{escape(str(value))}"' for name, value in shape)
                page = f'<img src="data:image/png;base64,{png}" {shape}>'
            page = page or f"<pre>{escape(data.get('text') or data.get('text/plain', ''))}</pre>"
            kept = {kind: data[kind] for kind in ("image/png", "text/plain") if kind in data}
            copy = {"text/plain": caption} | kept | {"text/html": f"{start}{page}</div>"}
            display(copy, metadata=about, raw=True)


def explore(function: Callable[..., Any], **controls: Any) -> Any:
    """Controls above what `function(**values)` returns or displays, anew after each change.

    Like `ipywidgets.interactive`, which streams its output: without a browser that sometimes
    leaves nbclient waiting forever (https://github.com/jupyter/nbclient/issues/312).
    """
    view = w.Output()

    def update(_: Any = None) -> None:
        view.add_class("labkit-busy")  # what is shown is of other values
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
        view.remove_class("labkit-busy")

    update()
    for control in controls.values():
        control.style.description_width = "8em"  # else "temperature" and longer words are cut
        control.observe(update, "value")
    return Explorer([*controls.values(), view])


def ask(
    networks: Mapping[str, Any],
    tokenizer: Any,
    questions: Sequence[str],
    *,
    template: str = "auto",
    max_new_tokens: int = 48,
) -> Any:
    """Asks the models, `{name: model}`, what the reader types: their answers side by side.

    `questions` are to choose from; an empty box asks the first. At temperature 0 decoding is greedy.
    """
    from labkit.generate import responses  # torch takes seconds

    options: dict[str, Any] = dict(template=template, max_new_tokens=max_new_tokens)

    def answers(question: str, temperature: float) -> Table:
        prompt, given = question.strip() or questions[0], options | {"temperature": temperature}
        found = [responses(net, tokenizer, [prompt], **given)[0][0] for net in networks.values()]
        return SideBySide(tuple(networks), [found])

    late: dict[str, Any] = dict(continuous_update=False)
    known = dict(options=list(questions), value=questions[0], layout={"width": "40em"})
    box = w.Combobox(description="question", **known, **late)
    slider = w.FloatSlider(description="temperature", max=1.5, step=0.1, **late)
    return explore(answers, question=box, temperature=slider)


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
