"""The model card of the base checkpoint, written from what its training recorded.

    python -m labkit.tinytown.card FOLDER

writes `FOLDER/README.md` anew from `pretraining.json`, `config.json` and, where
`benchmarks/askability.py` left one, `askability.json`. No figure is typed by hand.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

_SETTINGS = ("rows", "length", "learning_rate", "shape", "seed")  # besides `cycles`
_SCORES = {
    "facts": "facts, other residents",
    "test": "new prompts",
    "heldout_phrasings": "new phrasings",
    "heldout_families": "new tasks",
}
_CARD = """\
---
license: mit
language: [en, zh]
library_name: transformers
pipeline_tag: text-generation
---

# Tinytown base

A Llama-architecture language model of {parameters:,} parameters that knows one small invented
town, in English and Chinese, and follows no instruction. It is what the notebooks fine-tune:
small enough to learn on a CPU in a minute, and its world is known exactly, so that every answer
can be marked.

## Data

{tokens:,} tokens of text from a seeded generator (`labkit/tinytown/corpus.py`, seed 0; the
tokenizer is trained on seed 1): {genres} genres, about 40 % of the documents in Chinese. The
templates were written for this project; nothing was copied, and no person in them exists.
Questions and answers appear as in forums and quizzes; no document has the form of an
instruction with its response.

## How it was made

{command}

{settings} The run that finished it, perhaps from a checkpoint, took {minutes} minutes. The weights
are stored in bfloat16.

## Architecture

{architecture}

## Held-out perplexity

Per token, on {genres} × 60 documents of another seed, the first token of each aside. The facts are
the same there, as they must be; what is new is the choice and the wording, and for genres of
few sentences (how-to, mischief, look-alikes) hardly that.

{perplexity}

## Can it be asked?

{askability}

## Intended use

Teaching and testing: the starting point of the notebooks, and a model for tests that must learn
something in seconds. Load it with `labkit.models.load("tinytown")`, or its folder with
`transformers.AutoModelForCausalLM.from_pretrained`. Its vocabulary holds the marks of
a chat (`<|user|>`, `<|assistant|>`, `<|system|>`) and a template for them, but it has never seen
them in use: learning that is what fine-tuning is for.

## Limits

It knows nothing outside its town, cannot count past 20 or hold a conversation, and states
falsehoods as fluently as facts. Its context is {context} tokens. It has read recipes for
invented mischief (itching powder, a faked letter from the mayor), so that refusing can be
taught. What holds for it need not hold for a large model: it shows a phenomenon, not its size.
"""


def write_card(out: Path, facts: dict[str, Any]) -> Path:
    """Write `out/README.md`, the model card of the checkpoint in `out`; returns its path.

    `facts` is what `pretraining.json` holds: tokens_seen, minutes, perplexity per genre, and the
    options of `pretrain`. Raises `FileNotFoundError` without config.json or model.safetensors,
    `ValueError` naming a fact that is missing.
    """
    needed = ("tokens_seen", "minutes", "perplexity", "cycles", *_SETTINGS)
    if missing := [name for name in needed if name not in facts]:
        raise ValueError(
            f"facts: expected {', '.join(needed)}; missing: {', '.join(missing)}. Take them from "
            "the pretraining.json that labkit.tinytown.pretrain wrote"
        )
    config = json.loads((out / "config.json").read_text("utf-8"))
    scores, results = facts["perplexity"], out / "askability.json"
    runs = json.loads(results.read_text("utf-8"))["runs"] if results.exists() else []
    card = _CARD.format(
        parameters=count_parameters(out / "model.safetensors"),
        tokens=facts["tokens_seen"],
        genres=len(scores),
        command=_command(facts),
        settings=_settings(facts),
        minutes=facts["minutes"],
        architecture=_architecture(config),
        perplexity=_table(("genre", "perplexity"), _perplexities(scores)),
        askability=_askability(runs),
        context=config["max_position_embeddings"],
    )
    (out / "README.md").write_text(card, "utf-8")
    return out / "README.md"


def count_parameters(file: Path) -> int:
    """The number of weights in a safetensors file, from its header alone."""
    with open(file, "rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return sum(math.prod(t["shape"]) for name, t in header.items() if name != "__metadata__")


def _command(facts: dict[str, Any]) -> str:
    options = ["--cycles", *map(str, facts["cycles"])]
    for name in _SETTINGS:
        options += [f"--{name.replace('_', '-')}", str(facts[name])]
    command = f"    python -m labkit.tinytown.pretrain --out DIR {shlex.join(options)}"
    return command if facts.get("compile", True) else f"{command} --no-compile"


def _settings(facts: dict[str, Any]) -> str:
    cycles = facts["cycles"]
    lengths = " and ".join(f"{n:,}" for n in cycles)
    each = f"in cosine cycles of {lengths}" if len(cycles) > 1 else "in one cosine cycle"
    return (
        f"{sum(cycles):,} steps of {facts['rows']} × {facts['length']} tokens, {each}, AdamW at a "
        f"peak learning rate of {facts['learning_rate']:g}, seed {facts['seed']}, bfloat16 "
        "autocast. Numbers differ a little between machines."
    )


def _architecture(config: dict[str, Any]) -> str:
    tied = "tied" if config.get("tie_word_embeddings") else "not tied"
    rows = [
        ("layers", config["num_hidden_layers"]),
        ("hidden size", config["hidden_size"]),
        ("feed-forward size", config["intermediate_size"]),
        ("attention heads (of keys)", _heads(config)),
        ("vocabulary", f"{config['vocab_size']:,} (byte-level BPE, both languages)"),
        ("embeddings", tied),
        ("context", f"{config['max_position_embeddings']} tokens"),
    ]
    return _table(("", ""), rows)


def _heads(config: dict[str, Any]) -> str:
    return f"{config['num_attention_heads']} ({config['num_key_value_heads']})"


def _perplexities(scores: dict[str, float]) -> list[tuple[str, str]]:
    mean = math.exp(sum(map(math.log, scores.values())) / len(scores))
    rows = [(genre, f"{value:.2f}") for genre, value in scores.items()]
    return [*rows, ("geometric mean", f"{mean:.2f}")]


def _askability(runs: list[dict[str, Any]]) -> str:
    if not runs:
        return "Not measured yet: `benchmarks/askability.py --base DIR --json DIR/askability.json`."
    head = ("tuning", "rows", "epochs", *_SCORES.values())
    rows = [
        (run["method"], f"{run['rows']:,}", f"{run.get('epochs', 0):g}")
        + tuple(f"{run[name]:.1%}" if name in run else "" for name in _SCORES)
        for run in runs
    ]
    return (
        "Answers right after tuning on instructions about half of the residents; the facts asked "
        "for are about the other half (`benchmarks/askability.py`, one row a run).\n\n"
        + _table(head, rows)
    )


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def main(folder: str) -> None:
    """Write the card of the checkpoint in `folder` anew."""
    out = Path(folder)
    print(write_card(out, json.loads((out / "pretraining.json").read_text("utf-8"))))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m labkit.tinytown.card FOLDER")
    main(sys.argv[1])
