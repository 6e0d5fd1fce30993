"""The embedded world: a small town whose truth is known exactly.

`documents` is the pretraining text; `instruction_rows` gives tasks, `in_own_form` asks them as the
base knows them, and `check` checks responses; `judge` is the gold judge, and `preference_pairs`,
`rankings` and `red_team` are made with it. `seed_tasks` are hand-written, for Self-Instruct; `mark`
checks tasks that a model made up.
The base checkpoint is in `base_folder()`; `scripts/pretrain_tinytown.py` made it.
"""

import hashlib
from functools import cache
from pathlib import Path

from .corpus import documents, genre_samples
from .judge import PARTS, Verdict, judge, marked, scores
from .preferences import (
    demonstrations,
    helpful_only,
    preference_pairs,
    prompts,
    rank_samples,
    rankings,
    red_team,
    unknowable,
)
from .recognize import list_heads, mark, recognize, seed_tasks, unasked
from .tasks import (
    FAMILIES,
    HELD_OUT_FAMILIES,
    SPLITS,
    check,
    in_own_form,
    instruction_rows,
    normalize,
)
from .world import Fact, Name, World, texts, world


def base_folder() -> Path:
    """The folder of the base checkpoint (safetensors, tokenizer, model card)."""
    return Path(__file__).parent / "base"


@cache
def base_checksum() -> str:
    """What tells this base checkpoint from others: the first digits of its weights' SHA-256."""
    weights = (base_folder() / "model.safetensors").read_bytes()
    return hashlib.sha256(weights).hexdigest()[:16]
