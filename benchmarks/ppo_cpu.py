"""How fast labkit's PPO is on a CPU, next to the last PPO that TRL had.

Conditions, interleaved, each run in a process of its own with the same model (the embedded base
after a short SFT, made here), prompts, greatest length, reward, epochs and minibatches:

    labkit        labkit.techniques.ppo
    trl           PPOTrainer of TRL 1.9, tuned by its flags: no gradient checkpointing, bfloat16
                  where the processor has it (`--trl-precision`), all examples sampled at once
    trl_defaults  the same with TRL's defaults for those three (`--defaults`)

TRL's comes with its own environment, installed here by pip. The reward is a function of texts:
how similar a response is to the row's answer (difflib, from -1 to 1). Times are of whole steps
(sample, reward, score, update) without loading and the first step; ratios are medians over
rounds. Both learn: the curves are means over rounds, each with its own seed. labkit's policy and
value share a backbone; `--separate` gives it a critic of its own, as TRL's has.

Needs a quiet machine: `python benchmarks/ppo_cpu.py --json out.json`, about 15 minutes.
"""

import argparse
import contextlib
import difflib
import importlib.metadata
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

for name in ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_OFFLINE"):
    os.environ.setdefault(name, "1")
os.environ |= {"WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false"}

TRL = "trl==1.9.*"
MARK = "RESULT "
STAGES = ("sample", "reward", "score", "update")
# Defaults of the command line. `steps` of a run, the first untimed; `batch` episodes per step;
# `tokens`: greatest length of a response; `threads`: 0 for as many as torch takes.
SETTINGS = {"steps": 12, "batch": 64, "minibatch": 32, "epochs": 4, "tokens": 48}
SETTINGS |= {"rate": 1e-4, "beta": 0.05, "threads": 0}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    for name, value in SETTINGS.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--trl-precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--defaults", action="store_true", help="also TRL's defaults")
    parser.add_argument("--separate", action="store_true", help="also labkit with its own critic")
    folder = Path(tempfile.gettempdir()) / "labkit-ppo-benchmark"
    parser.add_argument("--folder", type=Path, default=folder, help="environment and model")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def similarity(expected: str, response: str) -> float:
    """The reward: 1 for the answer itself, -1 for nothing in common."""
    return 2 * difflib.SequenceMatcher(None, expected, response, autojunk=False).ratio() - 1


# What is measured, each in a process of its own


def run_labkit(job: dict[str, Any]) -> dict[str, Any]:
    from labkit import models
    from labkit.techniques import ppo

    def reward(prompts, responses, rows):
        return [similarity(row["completion"], r) for row, r in zip(rows, responses, strict=True)]

    model, tokenizer = models.load(job["model"])
    sizes = {"batch_size": job["batch"], "minibatch_size": job["minibatch"], "steps": job["steps"]}
    sizes |= {"epochs": job["epochs"], "max_new_tokens": job["tokens"], "seed": job["seed"]}
    sizes |= {"separate_critic": job["condition"] == "labkit_separate"}
    config = ppo.PPOConfig(learning_rate=job["rate"], beta=job["beta"], **sizes)
    ends: list[float] = []
    options = {"progress": False, "log": lambda metrics, step: ends.append(time.perf_counter())}
    history = ppo.train(model, tokenizer, job["rows"], reward, config, **options).history
    stages = {s: sum(entry[f"seconds_{s}"] for entry in history[1:]) for s in STAGES}
    curve, kl = ([entry[name] for entry in history] for name in ("reward", "kl_k1"))
    return {"ends": ends, "curve": curve, "kl": kl, "stages": stages}


def run_trl(job: dict[str, Any]) -> dict[str, Any]:
    import torch
    import transformers
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    causal = transformers.AutoModelForCausalLM
    policy, reference = (causal.from_pretrained(job["model"], dtype=torch.float32) for _ in "pr")
    classifier = transformers.AutoModelForSequenceClassification
    value = classifier.from_pretrained(job["model"], num_labels=1, dtype=torch.float32)
    torch.nn.init.zeros_(value.score.weight)
    ids = [tokenizer(row["text"], add_special_tokens=False)["input_ids"] for row in job["rows"]]
    answers = {tuple(x): row["completion"] for x, row in zip(ids, job["rows"], strict=True)}
    reward = text_reward(tokenizer, answers)
    settings = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    settings |= {"num_sample_generations": 0, "seed": job["seed"], "learning_rate": job["rate"]}
    # Without accumulation there is an optimizer step per minibatch; with it, one per epoch.
    settings |= {"per_device_train_batch_size": job["batch"], "gradient_accumulation_steps": 1}
    settings |= {"num_mini_batches": job["batch"] // job["minibatch"]}
    settings |= {"num_ppo_epochs": job["epochs"], "total_episodes": job["steps"] * job["batch"]}
    settings |= {"response_length": job["tokens"], "stop_token": "eos", "missing_eos_penalty": 1.0}
    settings |= {"temperature": 1.0, "kl_coef": job["beta"], "adam_epsilon": 1e-5}
    if job["condition"] == "trl":
        settings["gradient_checkpointing"] = False
        settings["local_rollout_forward_batch_size"] = job["batch"]
        if job["trl_precision"] == "bf16":
            os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"  # its flag bf16 alone changes nothing
    ends: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        args = PPOConfig(output_dir=folder, **settings)
        rows, models = Dataset.from_dict({"input_ids": ids}), (policy, reference, reward)
        trainer = PPOTrainer(args, tokenizer, *models, rows, value, callbacks=[Clock()])
        trainer.train()
    size, seen = job["batch"], reward.backbone.seen
    curve = [statistics.fmean(seen[i : i + size]) for i in range(0, len(seen), size)]
    kl = [entry["objective/kl"] for entry in trainer.state.log_history if "objective/kl" in entry]
    versions = {name: importlib.metadata.version(name) for name in ("trl", "transformers", "torch")}
    return {"ends": ends, "curve": curve, "kl": kl, "versions": versions}


def text_reward(tokenizer, answers: dict[tuple[int, ...], str]):
    """A reward of texts in the shape of the model that PPOTrainer expects."""
    import torch

    class Backbone(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[float] = []
            self.assistant = tokenizer.convert_tokens_to_ids("<|assistant|>")

        def forward(self, input_ids, attention_mask, **kwargs):
            rewards = []
            for row in input_ids.tolist():
                row = row[next(i for i, token in enumerate(row) if token != 0) :]
                start = row.index(self.assistant) + 1
                response = tokenizer.decode(row[start:], skip_special_tokens=True)
                rewards.append(similarity(answers[tuple(row[:start])], response))
            self.seen += rewards
            values = torch.tensor(rewards)[:, None, None].expand(*input_ids.shape, 1)
            return type("Output", (), {"hidden_states": [values]})

    reward = torch.nn.Module()
    reward.base_model_prefix, reward.backbone = "backbone", Backbone()
    reward.score = torch.nn.Identity()
    return reward


def work(file: str) -> None:
    job = json.loads(Path(file).read_text())
    import torch

    if job["threads"]:
        torch.set_num_threads(job["threads"])
    started = time.perf_counter()
    result = (run_labkit if job["condition"].startswith("labkit") else run_trl)(job)
    ends = result.pop("ends")
    speed = (len(ends) - 1) * job["batch"] / (ends[-1] - ends[0])
    result |= {"episodes_per_second": speed, "threads": torch.get_num_threads()}
    print(MARK + json.dumps(result | {"seconds": time.perf_counter() - started}), flush=True)


# What they share: an environment for TRL, a model, rows


def environment(folder: Path) -> Path:
    """The Python of an environment with TRL 1.9 and this one's torch and transformers."""
    python, done = folder / "trl" / "bin" / "python", folder / "trl" / "installed"
    if not done.exists():
        print(f"installing {TRL} into {folder / 'trl'}", flush=True)
        version = importlib.metadata.version
        pins = [f"{name}=={version(name).partition('+')[0]}" for name in ("torch", "transformers")]
        subprocess.run([sys.executable, "-m", "venv", folder / "trl"], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", TRL, *pins], check=True)
        done.touch()
    return python


def tuned_model(folder: Path) -> Path:
    """The base after a short SFT on answers, a third of them rude, wrong or rambling."""
    from labkit import data, models, training
    from labkit.tinytown import demonstrations

    if not (folder / "sft" / "config.json").exists():
        model, tokenizer = models.load("tinytown")
        examples = data.encode(demonstrations(2400, seed=7), tokenizer)
        config = training.TrainConfig(learning_rate=5e-4, batch_size=16)
        training.fit(model, examples, training.sft_loss, config, progress=False)
        models.save(model, tokenizer, folder / "sft")
    return folder / "sft"


def prompt_rows(model: Path, count: int) -> list[dict[str, str]]:
    from transformers import AutoTokenizer

    from labkit import templates
    from labkit.tinytown.preferences import prompts

    render = templates.renderer(AutoTokenizer.from_pretrained(model))
    rows = list({row["prompt"]: row for row in prompts(2 * count, seed=1)}.values())[:count]
    kept = [{name: row[name] for name in ("prompt", "completion")} for row in rows]
    return [row | {"text": render(row)[0]} for row in kept]


def run(python: Path | str, job: dict[str, Any]) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(json.dumps(job))
        file.flush()
        command = [python, __file__, "--worker", file.name]
        done = subprocess.run(command, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
    raise RuntimeError(f"{job['condition']} failed:\n{done.stderr[-4000:]}")


def summary(rounds: list[dict[str, dict]]) -> dict[str, Any]:
    speed, names = "episodes_per_second", list(rounds[0])
    found: dict[str, Any] = {speed: {}, "reward": {}, "kl": {}, "reward_last_third": {}}
    for name in names:
        found[speed][name] = statistics.median(r[name][speed] for r in rounds)
        for key, source in (("reward", "curve"), ("kl", "kl")):
            steps = zip(*(r[name][source] for r in rounds), strict=True)
            found[key][name] = [round(statistics.fmean(values), 4) for values in steps]
        last = found["reward"][name][-max(1, len(found["reward"][name]) // 3) :]
        found["reward_last_third"][name] = statistics.fmean(last)
    for name, other in itertools.product(names, names):
        if name.startswith("labkit") and other.startswith("trl"):
            ratios = [r[name][speed] / r[other][speed] for r in rounds]
            found[f"{name}_over_{other}"] = statistics.median(ratios)
    stages = {s: statistics.median(r["labkit"]["stages"][s] for r in rounds) for s in STAGES}
    found["labkit_stages"] = {s: x / sum(stages.values()) for s, x in stages.items()}
    return found


def show(found: dict[str, Any]) -> None:
    for name, speed in found["episodes_per_second"].items():
        curve, kl = " ".join(f"{x:.2f}" for x in found["reward"][name]), found["kl"][name][-1]
        print(f"{name:16} {speed:7.1f} episodes/s   reward {curve}   KL {kl:.2f}")
    shares = ", ".join(f"{s} {100 * x:.0f} %" for s, x in found["labkit_stages"].items())
    print(f"labkit's time: {shares}")
    for name in (name for name in found if "_over_" in name):
        print(f"{name}: {found[name]:.2f}")


def main() -> None:
    args = parse()
    if args.worker:
        return work(args.worker)
    from labkit import models, record

    args.folder.mkdir(parents=True, exist_ok=True)
    python, model = environment(args.folder), tuned_model(args.folder)
    chosen = {"labkit": True, "labkit_separate": args.separate}
    chosen |= {"trl": True, "trl_defaults": args.defaults}
    names = [name for name, given in chosen.items() if given]
    settings: dict[str, Any] = {name: getattr(args, name) for name in (*SETTINGS, "trl_precision")}
    if args.trl_precision == "auto":
        settings["trl_precision"] = "bf16" if models.cpu_has_bf16() else "fp32"
    rows, rounds = prompt_rows(model, args.steps * args.batch), []
    for seed in range(args.rounds):
        found = {}
        for name in names if seed % 2 == 0 else names[::-1]:
            job = settings | {"condition": name, "seed": seed, "model": str(model), "rows": rows}
            found[name] = run(sys.executable if name.startswith("labkit") else python, job)
            speed = found[name]["episodes_per_second"]
            print(f"round {seed}: {name} {speed:.1f} episodes/s", flush=True)
        rounds.append({name: found[name] for name in names})
    result = summary(rounds)
    show(result)
    if args.json:
        about = {"hardware": record.hardware(), "versions": record.versions()}
        about |= {"trl_versions": rounds[0]["trl"]["versions"], "settings": settings}
        args.json.write_text(json.dumps(about | result | {"rounds": rounds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
