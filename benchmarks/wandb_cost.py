"""What a training's time pays for W&B: without it, with a server, with a slow and with a dead one.

LoRA on Tinytown's base for about a minute, the same steps each time, interleaved; a history of two
hundred entries is logged, as of every training. A round's condition is a process of its own, on one
core that it shares with all that W&B starts; the server has the others. Its seconds are those of
training alone, W&B's start among them. Ratios are medians over rounds of a condition's time to that
without W&B; on a noisy machine the processor's time that W&B took tells more, as a share of the
training's. The slow server takes five seconds for every answer.

    python benchmarks/wandb_cost.py --json benchmarks/results/wandb_cost.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from labkit import record

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from wandb_server import WandbServer  # noqa: E402  (of the tests)

CORE, *OTHERS = sorted(os.sched_getaffinity(0))
CONDITIONS = {"server": 0.0, "slow": 5.0, "dead": 0.0}
RUN = """
import os, sys, time
os.sched_setaffinity(0, {int(sys.argv[3])})
import psutil, torch
from labkit import data, models, record, tinytown
from labkit.techniques import lora
from labkit.training import TrainConfig, fit, sft_loss

torch.set_num_threads(1)
run = record.start("cost", {}, root=sys.argv[1])
model, tokenizer = models.load("tinytown", device="cpu", dtype="float32")
model = lora.attach(model, lora.LoraConfig(rank=8))
rows = data.encode(tinytown.instruction_rows("train", 1600), tokenizer)
config = TrainConfig(batch_size=16, max_steps=int(sys.argv[2]))
result = fit(model, rows, sft_loss, config, log=run.log, progress=False)
times = [entry["seconds"] for entry in result.history]
others = time.process_time() - time.thread_time()
for child in psutil.Process().children(recursive=True):
    others += sum(child.cpu_times()[:2])
print(times[-1] - times[0], others)  # the first steps warm up
run.finish()
"""


def seconds(steps: int, environment: dict[str, str]) -> tuple[float, float]:
    """Of training, and of the processor's time that other threads and processes of the run took."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", RUN, folder, str(steps), str(CORE)]
        keep = {"env": os.environ | environment, "text": True, "check": True}
        out = subprocess.run(command, capture_output=True, **keep)
    took, beside = map(float, out.stdout.split()[-2:])
    return took, beside


def measured(name: str, steps: int) -> tuple[float, float]:
    if name == "none":
        return seconds(steps, {"WANDB_MODE": "disabled"})
    with WandbServer(CONDITIONS[name]) as server:
        if name == "dead":
            server.close()
        return seconds(steps, server.environment())


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--steps", type=int, default=900)
    p.add_argument("--json", type=Path, help="write the results here")
    args = p.parse_args()
    os.sched_setaffinity(0, OTHERS or {CORE})
    names, found = ["none", *CONDITIONS], []
    for number in range(args.rounds):
        order = names[number % len(names) :] + names[: number % len(names)]
        found.append({name: measured(name, args.steps) for name in order})
        print({name: [round(x, 2) for x in both] for name, both in found[-1].items()}, flush=True)
    over = {f"{n}_over_none": [r[n][0] / r["none"][0] for r in found] for n in CONDITIONS}
    for n in CONDITIONS:  # what W&B took of the processor, as a share of the training's time
        over[f"{n}_processor"] = [(r[n][1] - r["none"][1]) / r["none"][0] for r in found]
    result = {name: statistics.median(values) for name, values in over.items()}
    print(", ".join(f"{name} {value:.3f}" for name, value in result.items()))
    if args.json:
        head = {"hardware": record.hardware(), "versions": record.versions()}
        head |= {"commit": record.commit(), "seconds": found}
        record.write_text(args.json, json.dumps(head | result, indent=1) + "\n")


if __name__ == "__main__":
    main()
