"""Will it fit? What a training run needs, part by part, before it starts, and what it took.

    plan("Qwen/Qwen2.5-7B", "qlora", batch_size=8, sequence_length=2048, device="cuda")

Only a model's configuration is read, never its weights. `shapes` says what memory depends on,
`activations` and `footprint` hold the formulas, `planner` applies them, `allocator` measures,
`chapter` compares with the chapter, `gate` stops a run that cannot fit. Beside what the allocator
sees a run needs what Python, its libraries and the driver take: the framework. Numbers are
decimal, 1 GB is 10^9 bytes.
"""

from labkit.memory.allocator import measured
from labkit.memory.chapter import chapter_table
from labkit.memory.gate import refuse
from labkit.memory.planner import Plan, fits, plan

__all__ = ["Plan", "chapter_table", "fits", "measured", "plan", "refuse"]
