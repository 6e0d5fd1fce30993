"""What a result was made with: versions, the project's commit, hardware, memory used."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

_PROJECT = Path(__file__).resolve().parents[1]
_PACKAGES = """labkit torch transformers trl peft bitsandbytes datasets accelerate tokenizers
safetensors numpy wandb papermill"""


def commit() -> str:
    """The commit of the project's checkout, `-dirty` after changes; empty where there is none."""
    describe = "git describe --always --dirty --abbrev=40 --exclude=*".split()
    with suppress(OSError, subprocess.SubprocessError):
        if (_PROJECT / ".git").exists():
            return subprocess.check_output(describe, cwd=_PROJECT, text=True, timeout=5).strip()
    return ""


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape a result."""
    from importlib.metadata import version  # slow to import

    return {"python": platform.python_version()} | {n: version(n) for n in _PACKAGES.split()}


def hardware() -> dict[str, Any]:
    """Processor, usable cores, memory in bytes; threads and GPUs where torch is loaded."""
    found: dict[str, Any] = {"system": f"{platform.system()} {platform.machine()}"}
    found["processor"] = _line("/proc/cpuinfo", "model name") or platform.processor()
    found["cores"] = len(getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0))
    found["memory_bytes"] = psutil.virtual_memory().total
    if torch := sys.modules.get("torch"):  # importing it would cost seconds
        found["threads"] = torch.get_num_threads()
        if devices := range(torch.cuda.device_count()):
            found["gpus"] = [torch.cuda.get_device_name(i) for i in devices]
            found["gpu_peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    return found


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    line = _line("/proc/self/status", "VmHWM")  # getrusage counts the parent's before exec
    return int(line.split()[0]) * 1024 if line else psutil.Process().memory_info().rss


def _line(file: str, name: str) -> str:
    text = Path(file).read_text() if Path(file).exists() else ""
    found = re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else ""
