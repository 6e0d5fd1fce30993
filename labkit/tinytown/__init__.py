"""The embedded world: a small town whose truth is known exactly.

`instruction_rows` gives tasks and `check` marks them; `documents` is the pretraining text;
`judge` is the gold judge; `preference_pairs`, `rankings` and `red_team` are made with it.
The base checkpoint lies in `base_folder()`.
"""

from pathlib import Path

from .corpus import documents, genre_samples
from .judge import Verdict, judge
from .preferences import (
    demonstrations,
    preference_pairs,
    rank_samples,
    ranked,
    rankings,
    red_team,
)
from .tasks import FAMILIES, HELD_OUT_FAMILIES, SPLITS, check, instruction_rows, normalize
from .world import Fact, Name, World, texts, world


def base_folder() -> Path:
    """The folder of the base checkpoint (safetensors, tokenizer, model card)."""
    return Path(__file__).parent / "base"


__all__ = [
    "FAMILIES",
    "HELD_OUT_FAMILIES",
    "SPLITS",
    "Fact",
    "Name",
    "Verdict",
    "World",
    "base_folder",
    "check",
    "demonstrations",
    "documents",
    "genre_samples",
    "instruction_rows",
    "judge",
    "normalize",
    "preference_pairs",
    "rank_samples",
    "ranked",
    "rankings",
    "red_team",
    "texts",
    "world",
]
