"""A model and its tokenizer, from the embedded town, a folder, or the hub; and back.

Decisions: only safetensors (a pickle can run code); padding is never the end token, else
the end is never learned; a folder is written whole or not at all. Counts and the meta
device answer questions about models that do not fit here. Left out: quantization
(`techniques/qlora`), adapters (`techniques/lora`).
"""

import contextlib
import fnmatch
import json
import logging
import re
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labkit import hub

log = logging.getLogger("labkit")

DTYPES = ("auto", "float32", "bfloat16", "float16")
TOKENIZER_FILES = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken", "tekken.json")
SAVED_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "chat_template.jinja",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "README.md",
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

    `model` is "tinytown", a folder, or a hub id (with `revision`). `dtype` "auto" is
    float32 on a CPU, bfloat16 on a GPU that has it. `device` "auto" is the first GPU if
    there is one. `pad_token`: see `check_tokenizer`.

    Raises `FileNotFoundError`, `ConnectionError` or `ValueError` whose message names
    `model` (or the other parameter), what came, and what to do; never a half-loaded model.
    """
    device = _device(device)
    torch_dtype = _dtype(dtype, device)
    folder = _find(str(model), revision, trust_remote_code)
    _check_folder(folder, model)
    network, tokenizer = _read(folder, model, torch_dtype, trust_remote_code, attn_implementation)
    check_tokenizer(tokenizer, pad_token)
    _fit_embeddings(network, tokenizer)
    network.config.pad_token_id = tokenizer.pad_token_id
    if getattr(network, "generation_config", None) is not None:
        network.generation_config.pad_token_id = tokenizer.pad_token_id
    return network.to(device).eval(), tokenizer


def _find(model: str, revision: str | None, with_code: bool) -> Path:
    if model == "tinytown":
        from labkit import tinytown

        return Path(tinytown.base_folder())
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", model):
        raise FileNotFoundError(
            f"model: expected 'tinytown', a folder or a hub id, got {model!r}, "
            f"which is {'a file' if folder.exists() else 'no folder here'}; check the path"
        )
    return hub.fetch(model, revision, with_code=with_code)


def _check_folder(folder: Path, model: str) -> None:
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []

    def has(*patterns: str) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for name in names for pattern in patterns)

    problem = ""
    if not folder.is_dir():
        problem = "does not exist"
    elif not has("config.json") and has("adapter_config.json"):
        problem = "holds an adapter only; give its base model here and attach the adapter to it"
    elif not has("config.json"):
        problem = "has no config.json; give the folder that save_pretrained wrote"
    elif not has("*.safetensors"):
        kind = "only pickled weights" if has("*.bin", "*.pt", "*.pth") else "no weights"
        problem = f"has {kind}; expected *.safetensors, written by save_pretrained"
    elif not has(*TOKENIZER_FILES):
        problem = "has no tokenizer; save one into it with tokenizer.save_pretrained(folder)"
    if problem:
        raise FileNotFoundError(f"model: {model!r}: the folder {folder} {problem}")


def _read(folder: Path, model: str, dtype, trust_remote_code: bool, attention: str | None):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    common = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    try:
        with no_progress_bar():
            tokenizer = AutoTokenizer.from_pretrained(folder, **common)
            network, info = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                attn_implementation=attention,
                output_loading_info=True,
                **common,
            )
    except Exception as error:
        raise ValueError(
            f"model: expected a causal language model of transformers in {model!r}, "
            f"got {type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"model: {model!r} lacks {len(missing)} weights of a {type(network).__name__} "
            f"(first: {missing[0]}); give a complete checkpoint of a causal language model"
        )
    if getattr(network, "loss_type", "") is None:  # GPT-2's class name says nothing of its loss
        network.loss_type = "ForCausalLM"
    return network, tokenizer


def check_tokenizer(tokenizer: Any, pad_token: str | None = "auto") -> Any:
    """Make sure that the tokenizer pads with a token of its own, and return it (changed in place).

    "auto" keeps a good pad token; if it is missing or equals the end token, an existing
    special token named like "pad" or "reserved", or the unknown token, takes its place,
    and a warning says so. A name sets that token, added if it is new. None only checks.

    Raises `ValueError` if there is no end token, or no pad token apart from it.
    """
    eos = tokenizer.eos_token
    if eos is None:
        raise ValueError("tokenizer: expected an end token (eos_token), got none; set one")
    if pad_token is not None and pad_token != "auto":
        _set_pad(tokenizer, pad_token)
    elif pad_token == "auto" and tokenizer.pad_token in (None, eos):
        spare = _spare_token(tokenizer)
        if spare is not None:
            log.warning("pad_token: %r is missing or the end token; using %r instead",
                        tokenizer.pad_token, spare)  # fmt: skip
            tokenizer.pad_token = spare
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ValueError(
            f"pad_token: expected a pad token that differs from the end token {eos!r}, got "
            f"{tokenizer.pad_token!r}; give one, for example pad_token='<|pad|>' (added if new)"
        )
    return tokenizer


def _set_pad(tokenizer: Any, pad_token: str) -> None:
    if not pad_token.strip():
        raise ValueError(f"pad_token: expected 'auto' or a token's name, got {pad_token!r}")
    if pad_token in tokenizer.get_vocab():
        tokenizer.pad_token = pad_token
    else:
        tokenizer.add_special_tokens({"pad_token": pad_token})


def _spare_token(tokenizer: Any) -> str | None:
    """A special token that can pad; ordinary pieces such as "ipad" must not."""
    taken = {tokenizer.eos_token, tokenizer.bos_token}
    special = [str(token) for _, token in sorted(tokenizer.added_tokens_decoder.items())]
    free = [token for token in special if token not in taken]
    pads = [token for token in free if "pad" in token.lower()]
    pads.sort(key=lambda token: re.sub(r"\W|_", "", token.lower()) != "pad")
    reserved = [token for token in free if "reserved" in token.lower()]
    unknown = [tokenizer.unk_token] if tokenizer.unk_token not in {None, *taken} else []
    return next(iter(pads + reserved + unknown), None)


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
    config.json) that holds one. Raises `ValueError` or `FileNotFoundError`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if isinstance(config, str | Path):
        path = Path(config).expanduser()
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"config: expected a folder with config.json, got {config}")
        config = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(config, dict):
        if "model_type" not in config:
            raise ValueError(
                f"config: expected the key 'model_type', got {sorted(config)}; "
                "add for example 'model_type': 'llama'"
            )
        config = AutoConfig.for_model(**config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def save(model: Any, tokenizer: Any, folder: str | Path) -> Path:
    """Write model (or adapter) and tokenizer as safetensors, whole or not at all.

    Written beside `folder` and renamed; an earlier model there is replaced at the end.
    Raises `FileExistsError` if the folder holds other files, `OSError` if it cannot be
    written.
    """
    folder = Path(folder).expanduser().absolute()
    _check_replaceable(folder)
    scratch = folder.parent / f".{folder.name}-{uuid.uuid4().hex[:8]}"
    try:
        scratch.mkdir(parents=True)
        with no_progress_bar():
            model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        _swap(scratch, folder)
    except BaseException as error:
        shutil.rmtree(scratch, ignore_errors=True)
        # safetensors reports a full disk as an error of its own
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise OSError(
                f"folder: could not write the model to {folder}: {error}; "
                "free some space or choose a folder that you may write to"
            ) from error
        raise
    return folder


def _check_replaceable(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"folder: expected a folder, {folder} is a file; choose another")
    for path in folder.iterdir() if folder.exists() else ():
        if not any(fnmatch.fnmatch(path.name, pattern) for pattern in SAVED_FILES):
            raise FileExistsError(
                f"folder: {folder} holds {path.name}, which is no part of a saved model and "
                "would be lost; choose another folder"
            )


def _swap(scratch: Path, folder: Path) -> None:
    if not folder.exists():
        scratch.rename(folder)
        return
    former = scratch.with_name(scratch.name + "-old")
    folder.rename(former)
    try:
        scratch.rename(folder)
    except BaseException:
        former.rename(folder)
        raise
    shutil.rmtree(former, ignore_errors=True)


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
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
    if kind == "cpu" and cpu_has_bf16() and parameter_counts(model).total >= 1_000_000:
        return torch.bfloat16
    return None


def _device(device: str) -> str:
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device: expected 'auto', 'cpu', 'cuda' or 'cuda:0', got {device!r}"
        ) from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: got {device!r}, but torch sees no GPU here; use 'cpu'")
    return device


def _dtype(dtype: str, device: str) -> Any:
    import torch

    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if dtype != "auto":
        return getattr(torch, dtype)
    has_bf16 = device.startswith("cuda") and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


@contextlib.contextmanager
def no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging as tf_logging

    shown = tf_logging.is_progress_bar_enabled()
    tf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            tf_logging.enable_progress_bar()


def base_model(model: Any) -> Any:
    """The model itself, without the wrappers of PEFT and of several processes."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def use_float32_attention(model: Any) -> None:
    from labkit import speed

    speed.quicken_attention(base_model(model))


@contextlib.contextmanager
def unchanged(model: Any) -> Iterator[None]:
    from labkit import speed

    with speed.as_before(model):
        yield
