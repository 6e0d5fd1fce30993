"""How long the filter of Self-Instruct takes: 10,000 candidates against a pool of 5,000, one core.

Texts are tasks of Tinytown in both languages with random words between, 10 to 20 tokens long; each
candidate is compared with the whole pool, and nothing joins it.

    python benchmarks/self_instruct_filter.py
"""

import argparse
import json
import time
from random import Random

from labkit import tinytown
from labkit.techniques import self_instruct


def texts(n: int, rng: Random) -> list[str]:
    words = tinytown.world().glossary
    tasks = [row for row in tinytown.seed_tasks()]
    found = []
    for _ in range(n):
        task, lang = (row := rng.choice(tasks))["instruction"], row["lang"]
        gap = " " if lang == "en" else ""
        parts = task.split() if lang == "en" else list(task)
        for word in rng.sample(words, 5):
            parts[rng.randrange(len(parts))] = word[lang]
        found.append(gap.join(parts)[:200])
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--candidates", type=int, default=10_000)
    parser.add_argument("--pool", type=int, default=5_000)
    args = parser.parse_args()
    rng = Random(0)
    pool = self_instruct.Pool()
    for text in texts(args.pool, rng):
        pool.add(self_instruct.Task(text, self_instruct.language(text)))
    candidates = texts(args.candidates, rng)
    started = time.process_time()
    kept = sum(self_instruct.keep(text, pool) is None for text in candidates)
    seconds = time.process_time() - started
    # Without a threshold, as for the provenance of what is kept.
    started, part = time.process_time(), candidates[: args.candidates // 10]
    for text in part:
        pool.nearest.find(text)
    exact = (time.process_time() - started) / max(len(part), 1)
    found = {"candidates": len(candidates), "pool": args.pool, "kept": kept}
    found |= {"seconds": round(seconds, 2), "ms_per_nearest": round(1000 * exact, 3)}
    print(json.dumps(found))
