"""A model and its tokenizer, from the embedded town, a folder or the hub; and back.

Decisions: only safetensors (a pickle can run code). Weights are float32 unless asked otherwise:
at a learning rate of 1e-5, 2.6 % of bfloat16 weights change at all. Padding is never the EOS
token, or the EOS is never learned. What a trainer leaves on a model is taken off (`unchanged`).
Left out: making adapters and quantization (`techniques`).
"""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import json
import logging
import random
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger("labkit")
# Right padding needs no mask in a causal model; GPT-2 and others ask for one all the same.
logging.getLogger("transformers.modeling_utils").addFilter(
    lambda record: "passing in an `attention_mask`" not in record.getMessage()
)
SAVED_FILES = re.compile(
    r".*\.(safetensors|safetensors\.index\.json)|(|generation_|adapter_)config\.json|labkit\.json"
    r"|tokenizer.*|(special_tokens_map|added_tokens)\.json|chat_template\.jinja|merges\.txt"
    r"|vocab\..*|README\.md"
)


def load(
    model: str = "tinytown",
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    pad_token: str | None = "auto",
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer, in eval mode.

    `model` is "tinytown", a folder, or a hub id (with `revision`). `dtype` "auto" is float32,
    `device` "auto" the first GPU if there is one; for `pad_token` see `check_tokenizer`.
    Raises FileNotFoundError, ConnectionError or ValueError, which name the parameter.
    """
    import torch

    device, kind = find_device(device), getattr(torch, dtype.replace("auto", "float32"), None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ValueError(f"dtype: expected auto, float32, bfloat16 or float16, got {dtype!r}")
    if model == "tinytown":
        from labkit import tinytown

        model = str(tinytown.base_folder())
    options = {"trust_remote_code": trust_remote_code, "revision": revision or "main"}
    try:
        with no_progress_bar():
            network, tokenizer = _read(model, options, dtype=kind, attn=attn_implementation)
    except Exception as error:
        raise _explained(error, model) from error
    check_tokenizer(tokenizer, pad_token)
    _fit_embeddings(network, tokenizer)
    for config in (network.config, network.generation_config):
        if config is not None:
            config.pad_token_id = tokenizer.pad_token_id
    return network.to(device).eval(), tokenizer


def find_device(device: str = "auto") -> str:
    """The name of the device that "auto" means; ValueError for one that is not here."""
    import torch

    has_gpu = torch.cuda.is_available()
    if device == "auto":
        return "cuda" if has_gpu else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?" if has_gpu else "cpu|mps", device):
        raise ValueError(f"device: expected 'auto', 'cpu' or a GPU that is here, got {device!r}")
    return device


def _read(model: str, options: dict, dtype: Any, attn: str | None) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    path = Path(model).expanduser()
    name = str(path) if path.exists() else model
    config = AutoConfig.from_pretrained(name, **options)
    # One commit for all files; for "main" transformers would ask a server to convert pickles.
    options["revision"] = getattr(config, "_commit_hash", None) or options["revision"]
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    options |= {"use_safetensors": True, "output_loading_info": True, "dtype": dtype}
    network, info = AutoModelForCausalLM.from_pretrained(name, attn_implementation=attn, **options)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{len(missing)} weights are missing, the first is {missing[0]}")
    if getattr(network, "loss_type", "") is None:  # GPT-2's class name says nothing of its loss
        network.loss_type = "ForCausalLM"
    return network, tokenizer


def _explained(error: BaseException, model: str) -> Exception:
    from huggingface_hub import errors as hub

    chain = [error]
    while inner := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(inner)
    said = f"model: {model!r} could not be loaded: {str(error).strip().partition(chr(10))[0][:300]}"

    def is_any(*kinds: type) -> bool:
        return any(isinstance(e, kinds) for e in chain)

    if is_any(hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled):
        return ConnectionError(f"{said}; check the network, HF_ENDPOINT and HF_HUB_OFFLINE")
    if is_any(hub.RepositoryNotFoundError, hub.RevisionNotFoundError, hub.HFValidationError):
        return FileNotFoundError(
            f"{said}; expected a folder here or a hub id, its revision, and "
            "your access to it (`hf auth login`)"
        )
    if is_any(hub.HTTPError, ConnectionError, TimeoutError):
        return ConnectionError(f"{said}; try again, or give a local folder")
    if "file named" in said:
        return FileNotFoundError(
            f"{said}; expected a folder with config.json, *.safetensors and a "
            "tokenizer (an adapter alone: load its base, then load_adapter)"
        )
    return ValueError(f"{said}; expected a complete causal language model of transformers")


def check_tokenizer(tokenizer: Any, pad_token: str | None = "auto") -> Any:
    """Make sure that the tokenizer pads with a token of its own, and return it (changed in place).

    "auto" keeps a good pad token; if it is missing or equals the EOS token, a special token
    named like "pad" or "reserved", the unknown token, or else a new one takes its place, and a
    warning says so. A name sets that token, added if it is new. None only checks.
    Raises ValueError if there is no EOS token, or no pad token apart from it.
    """
    eos = tokenizer.eos_token
    if eos is None:
        raise ValueError("tokenizer: expected an EOS token (eos_token), got none; set one")
    if pad_token == "auto" and tokenizer.pad_token in (None, eos):
        pad_token = _spare_token(tokenizer)
        log.warning("pad_token: %r is missing or EOS; using %r", tokenizer.pad_token, pad_token)
    if pad_token not in (None, "auto"):
        tokenizer.add_special_tokens({"pad_token": pad_token})  # a known one keeps its number
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        raise ValueError(
            f"pad_token: expected a token that differs from the EOS token {eos!r}, "
            f"got {tokenizer.pad_token!r}; give one, such as '<|pad|>' (added if new)"
        )
    return tokenizer


def _spare_token(tokenizer: Any) -> str:
    """A special token that can pad; ordinary pieces such as "ipad" must not."""
    taken = {tokenizer.eos_token, tokenizer.bos_token, None}
    special = [str(token) for _, token in sorted(tokenizer.added_tokens_decoder.items())]
    for pattern in (r"[\W_]*pad[\W_]*", ".*pad.*", ".*reserved.*"):
        for token in special:
            if token not in taken and re.fullmatch(pattern, token.lower()):
                return token
    return "<|pad|>" if tokenizer.unk_token in taken else tokenizer.unk_token


def _fit_embeddings(model: Any, tokenizer: Any) -> None:
    """Give every token a row; new rows start at the mean, so they say nothing special."""
    import torch

    rows = model.get_input_embeddings().weight.shape[0]
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed <= rows:
        return
    log.warning("tokenizer: %d tokens, embedding: %d rows; adding rows at the mean", needed, rows)
    model.resize_token_embeddings(needed, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            if layer is not None:
                layer.weight[rows:] = layer.weight[:rows].float().mean(0).to(layer.weight.dtype)


@dataclass(frozen=True)
class Counts:
    """Parameters of a model: how many, how many train, their share (0–1), and bytes of all."""

    total: int
    trainable: int
    share: float
    bytes: int


def parameter_counts(model: Any) -> Counts:
    """Count parameters, a tied matrix once; works on the meta device too."""
    parameters = list(model.parameters())
    total = sum(p.numel() for p in parameters)
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    size = sum(p.numel() * p.element_size() for p in parameters)
    return Counts(total, trainable, trainable / total if total else 0.0, size)


def meta_model(config: Any) -> Any:
    """Build a model without memory for its weights, to count or to plan.

    `config` is a configuration of transformers, a dict with `model_type`, or a folder (or
    config.json) that holds one. Raises ValueError or FileNotFoundError.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if isinstance(config, str | Path):
        path = Path(config).expanduser()
        config = json.loads((path if path.suffix == ".json" else path / "config.json").read_text())
    if isinstance(config, dict):
        config = AutoConfig.for_model(**{"model_type": "", **config})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def save(model: Any, tokenizer: Any, folder: str | Path) -> Path:
    """Write model (or adapter) and tokenizer as safetensors: all of it or nothing.

    Written beside `folder` and renamed; an earlier model there is replaced at the end. Raises
    OSError (FileExistsError for a folder with other files), or ValueError for a base in four bits.
    """
    folder, adapter = Path(folder).expanduser().absolute(), hasattr(model, "peft_config")
    if not adapter and made_of(model)["weights"] == "4-bit":
        raise ValueError("model: four bits cannot be saved; save an adapter, or use qlora.merge")
    for path in folder.iterdir() if folder.exists() else ():
        if not SAVED_FILES.fullmatch(path.name) and not (path / "adapter_config.json").is_file():
            raise FileExistsError(f"folder: {folder} holds {path.name}, which would be lost")
    scratch = folder.parent / f".{folder.name}-{uuid.uuid4().hex[:8]}"
    try:
        scratch.mkdir(parents=True)
        with no_progress_bar():
            # PEFT would add an embedding that has grown, which fits no published base.
            model.save_pretrained(scratch, **({"save_embedding_layers": False} if adapter else {}))
        for config in scratch.rglob("adapter_config.json"):  # a named adapter has its own folder
            (config.parent / "labkit.json").write_text(json.dumps({"base": made_of(model)}))
        tokenizer.save_pretrained(scratch)
        _replace(folder, scratch)
    except BaseException as error:
        shutil.rmtree(scratch, ignore_errors=True)
        # safetensors reports a full disk as an error of its own
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise OSError(f"folder: could not write the model to {folder}: {error}") from error
        raise
    return folder


def _replace(folder: Path, scratch: Path) -> None:
    former = scratch.with_name(scratch.name + "-old")
    if folder.exists():
        folder.rename(former)
    try:
        scratch.rename(folder)
    except BaseException:
        if former.exists():
            former.rename(folder)
        raise
    shutil.rmtree(former, ignore_errors=True)


def made_of(model: Any) -> dict[str, Any]:
    """What an adapter must find in its base: class, kind, sizes, and the type of the weights."""
    import torch

    base = base_model(model)
    config = base.config.get_text_config()
    found = {
        k: getattr(config, k, None) for k in ("model_type", "hidden_size", "num_hidden_layers")
    }
    packed = any(t.dtype == torch.uint8 for t in (*base.parameters(), *base.buffers()))
    return {
        "class": type(base).__name__,
        **found,
        "weights": "4-bit" if packed else str(base.dtype),
    }


def load_adapter(model: Any, folder: str | Path) -> Any:
    """`model` with the adapter that `save` or PEFT wrote to `folder`, frozen, in eval mode.

    For LoRA, prefixes and bottleneck adapters (import `techniques.adapter` first). Raises
    FileNotFoundError where there is none, and ValueError, `model` being as before, if it does not
    fit: adapters are there already, or another base, missing, unknown or non-finite weights.
    """
    import peft
    from safetensors.torch import load_file

    folder = Path(folder).expanduser()
    if not (folder / "adapter_model.safetensors").is_file():
        named = sorted(path.parent.name for path in folder.glob("*/adapter_config.json"))
        hint = f"it has them in {', '.join(named)}" if named else "give one that models.save wrote"
        raise FileNotFoundError(f"folder: {folder} has no adapter_model.safetensors; {hint}")
    if hasattr(model, "peft_config"):
        raise ValueError("model: it has adapters already; merge them, or load it again")
    _check_base(model, folder)
    before = _snapshot(model)
    try:
        with quiet_peft():
            tuned = peft.PeftModel.from_pretrained(model, str(folder))
            keys = tuned.load_adapter(str(folder), "default")  # again, for what did not fit
        weights = load_file(folder / "adapter_model.safetensors")
        soft_prompt = tuned.active_peft_config.is_prompt_learning  # in no list of keys
        wrong = [] if soft_prompt else [*keys.missing_keys, *keys.unexpected_keys]
        wrong += [name for name, weight in weights.items() if not weight.isfinite().all()]
        if wrong:
            raise ValueError(f"{len(wrong)} missing, unknown or non-finite weights, as {wrong[0]}")
    except Exception as error:
        before()
        hint = "; import labkit.techniques.adapter first" if "LABKIT" in str(error) else ""
        raise ValueError(
            f"folder: {folder} does not fit the model: {error}"[:400] + hint
        ) from error
    return tuned.eval()


def _check_base(model: Any, folder: Path) -> None:
    if not (folder / "labkit.json").is_file():
        return
    made, given = json.loads((folder / "labkit.json").read_text())["base"], made_of(model)
    if ("4-bit" in made.pop("weights")) != ("4-bit" in given.pop("weights")):
        log.warning("folder: %s was trained on a base in other bits (see qlora)", folder)
    if made != given:
        raise ValueError(f"folder: the adapter in {folder} was made on {made}, not {given}")


@contextlib.contextmanager
def unchanged(model: Any) -> Iterator[None]:
    """Within it, a trainer may leave on `model` what it likes; afterwards only weights differ.

    As before are modes, dropout, hooks, patched methods, marks, gradient checkpointing, adapters,
    `requires_grad` and configurations of all modules, the random states of Python, numpy and
    torch, and accelerate's precision; gradients are cleared. Also if the body raises.
    """
    import numpy as np
    import torch
    from accelerate.state import AcceleratorState

    before, python, numpy = _snapshot(model), random.getstate(), np.random.get_state()
    shared = AcceleratorState._shared_state
    AcceleratorState._shared_state = dict(shared)  # Accelerators of the body keep this one
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        before()
        model.zero_grad()
        AcceleratorState._shared_state = shared
        random.setstate(python)
        np.random.set_state(numpy)


def _snapshot(model: Any) -> Callable[[], None]:
    """A function that puts all but the values of weights back as it is now."""
    boxes = (dict, list, set)
    kept = []
    for module in model.modules():
        attributes = dict(vars(module))
        contents = {k: copy.copy(v) for k, v in attributes.items() if isinstance(v, boxes)}
        kept.append((module, attributes, contents))
    flags = [
        (module, name, weight.requires_grad)
        for module, _, contents in kept
        for name, weight in contents["_parameters"].items()
        if weight is not None
    ]
    configs: dict[int, Any] = {}
    for _, attributes, _ in kept:
        _find_configs(attributes, configs)
    # Configurations are shared between modules, so each is kept and refilled itself.
    states = [(c, copy.deepcopy(vars(c), dict(configs))) for c in configs.values()]

    def put_back() -> None:
        for module, attributes, contents in kept:
            for group in ("_parameters", "_buffers"):  # their values may have changed
                now = vars(module)[group]
                contents[group] = {
                    name: now.get(name, was) for name, was in contents[group].items()
                }
            _refill(vars(module), attributes)
            for name, content in contents.items():
                _refill(attributes[name], content)
        for config, state in states:
            _refill(vars(config), state)
        for module, name, flag in flags:
            module._parameters[name].requires_grad_(flag)

    return put_back


def _refill(box: Any, content: Any) -> None:
    box.clear()
    (box.extend if isinstance(box, list) else box.update)(content)


def _find_configs(value: Any, found: dict[int, Any]) -> None:
    """Configurations of transformers, of generation and of PEFT, and those within them."""
    if isinstance(value, dict):
        for inner in value.values():
            _find_configs(inner, found)
    elif type(value).__name__.endswith("Config") and id(value) not in found:
        found[id(value)] = value
        _find_configs(vars(value), found)


def base_model(model: Any) -> Any:
    """The model of transformers under PEFT's wrapper and that of distributed training."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def use_float32_attention(model: Any) -> None:
    """Computes attention in float32 also under autocast, where `model` uses the library's `sdpa`.

    On a CPU, bfloat16 attention takes up to eight times as long backward: at 37 tokens a
    forward and backward pass took 21.6 ms in bfloat16, 6.7 ms in float32.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    base = base_model(model)
    if base.config._attn_implementation == "sdpa":
        AttentionInterface.register("labkit_float32", _float32_attention)
        AttentionMaskInterface.register("labkit_float32", sdpa_mask)
        base.set_attn_implementation("labkit_float32")


def _float32_attention(module, query, key, value, attention_mask, **kwargs):
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    with torch.autocast(query.device.type, enabled=False):
        output, weights = sdpa_attention_forward(
            module, query.float(), key.float(), value.float(), attention_mask, **kwargs
        )
    return output.to(value.dtype), weights


def context_length(model: Any) -> int | None:
    """Tokens that fit into the model's context, those of a soft prompt or prefix taken off."""
    context = getattr(model.config, "max_position_embeddings", None)
    prompt: Any = getattr(model, "active_peft_config", None)
    virtual = prompt.num_virtual_tokens if getattr(prompt, "is_prompt_learning", False) else 0
    return context and context - virtual


def cpu_has_bf16() -> bool:
    """Whether this processor multiplies bfloat16 natively; elsewhere it is emulated and slow."""
    import torch

    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def autocast_dtype(model: Any) -> Any | None:
    """bfloat16 where autocast pays, else None (train in the weights' own type).

    On a CPU: native bfloat16 and at least a million parameters (below, casting costs more
    than it saves). On a GPU: whenever it has bfloat16.
    """
    import torch

    kind = next(model.parameters()).device.type
    on_cpu = kind == "cpu" and cpu_has_bf16() and parameter_counts(model).total >= 1_000_000
    on_gpu = kind == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if on_cpu or on_gpu else None


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Without PEFT's warnings: of a renamed attribute, and of keys, which `load_adapter` checks."""
    with warnings.catch_warnings():
        for text in ("`is_gradient_checkpointing` is deprecated", "Found missing adapter keys"):
            warnings.filterwarnings("ignore", text)
        yield


@contextlib.contextmanager
def no_progress_bar() -> Iterator[None]:
    """Without the bars of transformers for loading and writing weights."""
    from transformers.utils import logging as tf_logging

    shown = tf_logging.is_progress_bar_enabled()
    tf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            tf_logging.enable_progress_bar()
