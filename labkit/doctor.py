"""`labkit doctor`: what this machine lacks for the notebooks, and a remedy for each problem."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import psutil

from labkit.record import project_root

OK, NOTE, PROBLEM = "✔", "◐", "✘"  # a note costs something, but the notebooks run
GB = 1e9


def examine() -> Iterator[tuple[str, str, str]]:
    """(sign, what was found, remedy) of each check; the remedy of a good one is empty."""
    good = (3, 11) <= sys.version_info[:2] < (3, 14)
    remedy = "make PYTHON=python3.12 setup, after removing .venv"
    yield _judged(good, f"Python {sys.version.split()[0]} in {sys.prefix}", remedy)
    lock = Path(__file__).resolve().parents[1] / "requirements.lock"
    pins = lock.read_text("utf-8").splitlines() if lock.exists() else metadata.requires("labkit")
    other = [found for found in map(_other, pins or []) if found]
    text = "packages as locked" if not other else f"packages not as locked: {', '.join(other)}"
    yield _judged(not other, text, "make setup, or pip install -r requirements.lock", NOTE)
    yield from _devices()
    free = psutil.virtual_memory().available / GB
    remedy = "close other programs, or give the container more: a notebook takes up to 2.5 GB"
    yield _judged(free > 2.5, f"{free:.1f} GB of memory free", remedy)
    free = shutil.disk_usage(project_root()).free / GB
    yield _judged(free > 1, f"{free:.1f} GB of disk free for runs/", "set LABKIT_RUNS elsewhere")
    yield from _services()


def _devices() -> Iterator[tuple[str, str, str]]:
    import torch

    if torch.cuda.is_available():
        free, total = (size / GB for size in torch.cuda.mem_get_info())
        yield OK, f"{torch.cuda.get_device_name()}, {free:.1f} of {total:.1f} GB free", ""
    else:
        remedy = "install torch's build for your CUDA, see pytorch.org"
        unused = shutil.which("nvidia-smi") is not None
        text = "an NVIDIA driver, but torch sees no GPU" if unused else "no GPU: the CPU will do"
        yield _judged(not unused, text, remedy, NOTE)
    try:
        from bitsandbytes import functional

        device = "cuda" if torch.cuda.is_available() else "cpu"
        functional.quantize_4bit(torch.ones(64, device=device))
        yield OK, "bitsandbytes quantizes", ""
    except Exception as error:
        remedy = "notebook 03 and QLoRA in 12 need it: pip install --force-reinstall bitsandbytes"
        yield PROBLEM, f"bitsandbytes: {error}", remedy


def _services() -> Iterator[tuple[str, str, str]]:
    import requests
    import wandb
    from huggingface_hub import constants

    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        requests.head(constants.ENDPOINT, timeout=3)
        yield OK, "the model hub is reached", ""
    except OSError as error:  # requests' errors are
        remedy = "not needed for Tinytown; for other models name a folder, or set HF_ENDPOINT"
        yield NOTE, f"the model hub is not reached: {type(error).__name__}", remedy
    mode = os.environ.get("WANDB_MODE", "")
    if mode in ("offline", "dryrun", "disabled") or not wandb.login(prompt=False, verify=False):
        remedy = "to share runs: wandb login; to send those that are kept: labkit sync"
        yield NOTE, f"W&B is {mode or 'offline (no login)'}", remedy
    else:
        yield OK, "W&B has a login", ""


def _judged(good: bool, text: str, remedy: str, bad: str = PROBLEM) -> tuple[str, str, str]:
    return (OK, text, "") if good else (bad, text, remedy)


def _other(pin: str) -> str:
    """How an installed package differs from a line `name==version`; empty if it does not."""
    found = re.match(r"([\w.-]+)==([\w.]+)$", pin.strip())  # no comment, no extra
    if not found:
        return ""
    try:
        version = metadata.version(found[1]).split("+")[0]
    except metadata.PackageNotFoundError:
        return f"{found[1]} is missing"
    return "" if version == found[2].split("+")[0] else f"{found[1]} {version} for {found[2]}"
