"""The package has layers: imports, deferred ones too, point down or sideways, never in a circle."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1] / "labkit"
LAYERS = """
config files tinytown formats templates models state batching show plots provenance similarity
cards wandb_log data pairs logprobs generate respond record sweeps notebooks checkpoints progress
training evaluation lab report dashboard spectra doctor widgets
judging refusals rating harness
techniques
simulation
memory
cli
"""
LEVEL = {name: level for level, names in enumerate(LAYERS.splitlines()) for name in names.split()}
SHARED = {"lora", "quantization", "rollout"}
BUILT_ON = dict.fromkeys(("qlora", "ppo", "critic_free"), SHARED)  # techniques that use another
BUILT_ON |= {"constitutional": {"dpo", "reward"}}


def imports(file):
    """Names of labkit's modules that a file imports, such as `data` or `techniques.lora`."""
    package = file.relative_to(ROOT.parent).parent.parts
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) + 1 - node.level]) if node.level else []
            start = base + (node.module or "").split(".") * bool(node.module)
            names = [[*start, alias.name] for alias in node.names]
        else:
            continue
        yield from (name[1:] for name in names if name[0] == "labkit" and len(name) > 1)


def test_imports_point_down():
    edges = {}
    for file in ROOT.rglob("*.py"):
        own = file.relative_to(ROOT).with_suffix("").parts
        for other in imports(file):
            if own[0] == "__init__" or other[0] not in LEVEL:
                continue
            assert LEVEL[other[0]] <= LEVEL[own[0]], f"{'/'.join(own)} imports {'.'.join(other)}"
            if own[0] == other[0] == "techniques":
                assert own[1] in BUILT_ON and other[1] in BUILT_ON[own[1]], (own, other)
            if own[0] != other[0]:
                edges.setdefault(own[0], set()).add(other[0])
    left = set(edges)
    while free := {name for name in left if not edges[name] & left}:
        left -= free
    assert not left, f"a circle among {sorted(left)}"
    assert len(edges) > 15
