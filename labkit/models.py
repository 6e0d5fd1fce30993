"""A model and its tokenizer, from the embedded town, a folder or the hub; and back.

Only safetensors (a pickle can run code). Weights are float32 unless asked otherwise: at a
learning rate of 1e-5, 2.6 % of bfloat16 weights change at all. Padding is never the EOS token,
or the EOS is never learned. What a trainer leaves on a model is taken off (`unchanged`).
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import re
import shutil
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers.utils import logging as transformers_logging

from labkit import templates
from labkit.files import model_place
from labkit.state import snapshot
from labkit.state import unchanged as unchanged

log = logging.getLogger("labkit")
# Right padding needs no mask in a causal model; GPT-2 and others ask for one all the same.
logging.getLogger("transformers.modeling_utils").addFilter(
    lambda record: "passing in an `attention_mask`" not in record.getMessage()
)
DTYPES = ("auto", "float32", "bfloat16", "float16")
SAVED = re.compile(
    r"(|generation_|adapter_)config\.json|.*\.safetensors(|\.index\.json)|labkit\.json|README\.md"
    r"|tokenizer.*|(special_tokens_map|added_tokens)\.json|chat_template\.jinja|merges\.txt|vocab\..*"
)


def load(
    model: str = "tinytown",
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    pad_token: str | None = "auto",
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer, in eval mode.

    `model` is "tinytown", a folder, or a hub id (with `revision`). `dtype` "auto" is float32,
    `device` "auto" the first GPU if there is one; for `pad_token` see `check_tokenizer`.
    Raises OSError for what is not there or not reached, ValueError for what cannot be used.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    device = find_device(device)
    name, revision = model_place(model), revision or "main"
    options = {"use_safetensors": True, "output_loading_info": True}
    options["dtype"] = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    try:
        with no_progress_bar():
            # One commit for all; for "main" transformers would ask a server to convert pickles.
            config = transformers.AutoConfig.from_pretrained(name, revision=revision)
            revision = getattr(config, "_commit_hash", None) or revision
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, revision=revision)
            read = transformers.AutoModelForCausalLM.from_pretrained
            network, info = read(name, revision=revision, **options)
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"{len(missing)} weights are missing, such as {missing[0]}")
    except Exception as error:
        kind, reason = OSError if isinstance(error, OSError) else ValueError, str(error).split()
        raise kind(f"model: {model!r} cannot be loaded: {' '.join(reason)}") from error
    if getattr(network, "loss_type", "") is None:  # GPT-2's class name says nothing of its loss
        network.loss_type = "ForCausalLM"
    check_tokenizer(tokenizer, pad_token)
    _fit_embeddings(network, tokenizer)
    for settings in filter(None, (network.config, network.generation_config)):
        settings.pad_token_id = tokenizer.pad_token_id
    return network.to(device).eval(), tokenizer


def find_device(device: str = "auto") -> str:
    """The device that "auto" means; torch's error for one that is not here."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return str(torch.empty(0, device=device).device)


def check_tokenizer(tokenizer: Any, pad_token: str | None = "auto") -> Any:
    """Make sure that the tokenizer pads with a token of its own, and return it (changed in place).

    "auto" replaces a pad token that is missing or the EOS token by a special token named like
    "pad" or "reserved", the unknown token, or else a new one. A name sets that token; None only
    checks. Raises ValueError without an EOS token, or a pad token apart from it.
    """
    pad, eos = tokenizer.pad_token, tokenizer.eos_token
    if eos is None:
        raise ValueError("tokenizer: expected an EOS token (eos_token), got none")
    if pad_token == "auto" and pad in (None, eos):
        pad_token = _spare_token(tokenizer)
        log.warning("pad_token: %r is missing or the EOS token; using %r instead", pad, pad_token)
    if pad_token not in (None, "auto"):
        tokenizer.add_special_tokens({"pad_token": pad_token})  # a known one keeps its number
    if tokenizer.pad_token in (None, eos):
        raise ValueError(f"pad_token: expected one that differs from the EOS token, got {eos!r}")
    return tokenizer


def _spare_token(tokenizer: Any) -> str:
    """A special token that can pad; ordinary pieces such as "ipad" must not."""
    taken = {tokenizer.eos_token, tokenizer.bos_token, None}
    special = [str(token) for _, token in sorted(tokenizer.added_tokens_decoder.items())]
    patterns = (r"[\W_]*pad[\W_]*", ".*pad.*", ".*reserved.*")
    found = [t for p in patterns for t in special if re.fullmatch(p, t.lower()) and t not in taken]
    return [*found, "<|pad|>" if tokenizer.unk_token in taken else tokenizer.unk_token][0]


def _fit_embeddings(model: Any, tokenizer: Any) -> None:
    """Give every token a row; new rows start at the mean, so they say nothing special."""
    rows, needed = len(model.get_input_embeddings().weight), max(tokenizer.get_vocab().values()) + 1
    if needed > rows:
        log.warning("tokenizer: %d tokens, embedding: %d rows; adding rows", needed, rows)
        model.resize_token_embeddings(needed, mean_resizing=False)
        for layer in filter(None, (model.get_input_embeddings(), model.get_output_embeddings())):
            layer.weight.data[rows:] = layer.weight.data[:rows].float().mean(0)


class Counts(NamedTuple):
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
    return Counts(total, trainable, trainable / max(total, 1), sum(p.nbytes for p in parameters))


def meta_model(config: Any) -> Any:
    """A model without memory for its weights, of a configuration or dict, or by its `load` name."""
    if isinstance(config, str | Path):
        config = transformers.AutoConfig.from_pretrained(model_place(config))
    if isinstance(config, dict):
        config = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def save(model: Any, tokenizer: Any, folder: str | Path) -> Path:
    """Write model (or adapter) and tokenizer as safetensors: all of it or nothing.

    An earlier model in `folder` is replaced at the end. The saved generation settings know all
    `eos_ids`. Raises FileExistsError for a folder with other files, ValueError for a base in four
    bits and for weights that are not finite.
    """
    folder, adapter = Path(folder).expanduser().absolute(), hasattr(model, "get_base_model")
    if not adapter and _made_of(model)["weights"] == "4-bit":
        raise ValueError("model: four bits cannot be saved; save an adapter, or use qlora.merge")
    for name, p in model.named_parameters():
        if p.itemsize > 1 and not p.isfinite().all():
            raise ValueError(f"model: expected finite weights, got inf or NaN in {name}")
    for path in folder.iterdir() if folder.exists() else ():
        if not SAVED.fullmatch(path.name) and not (path / "adapter_config.json").is_file():
            raise FileExistsError(f"folder: {folder} holds {path.name}, which would be lost")
    scratch = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    former = scratch.with_suffix(".old")
    try:
        scratch.mkdir(parents=True)
        with no_progress_bar():
            # PEFT would add an embedding that has grown, which fits no published base.
            model.save_pretrained(scratch, **({"save_embedding_layers": False} if adapter else {}))
        if not adapter and (settings := copy.deepcopy(getattr(model, "generation_config", None))):
            settings.eos_token_id = sorted(eos_ids(model, tokenizer)) or None
            settings.save_pretrained(scratch)
        for config in scratch.rglob("adapter_config.json"):  # a named adapter has its own folder
            (config.parent / "labkit.json").write_text(json.dumps({"base": _made_of(model)}))
        tokenizer.save_pretrained(scratch)
        if folder.exists():
            folder.rename(former)
        scratch.rename(folder)
    finally:
        if former.exists() and not folder.exists():
            former.rename(folder)
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(former, ignore_errors=True)
    return folder


def eos_ids(model: Any, tokenizer: Any, template: str = "auto") -> set[int]:
    """The tokens that end a response: the template's, the tokenizer's, the model's own."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *([own] if isinstance(own, int) else own or ())} - {None}
    with contextlib.suppress(ValueError):  # a chat template that takes no plain question
        ends |= templates.eos_ids(tokenizer, template)
    return ends


def _made_of(model: Any) -> dict[str, Any]:
    """What an adapter must find in its base: class, kind, sizes, and the type of the weights."""
    base, config = base_model(model), base_model(model).config.get_text_config()
    packed = any(t.dtype == torch.uint8 for t in (*base.parameters(), *base.buffers()))
    sizes = {k: getattr(config, k, None) for k in ("hidden_size", "num_hidden_layers")}
    made = {"class": type(base).__name__, "model_type": config.model_type, **sizes}
    return made | {"weights": "4-bit" if packed else str(base.dtype)}


def load_adapter(model: Any, folder: str | Path) -> Any:
    """`model` with the adapter that `save` or PEFT wrote to `folder`, frozen, in eval mode.

    For LoRA, prefixes and bottleneck adapters (import `techniques.adapter` first). Raises
    FileNotFoundError, or ValueError, `model` being as before, if the adapter does not fit:
    another base, or missing, unknown or non-finite weights.
    """
    import peft
    from safetensors.torch import load_file

    file = Path(folder).expanduser() / "adapter_model.safetensors"
    folder, record = file.parent, file.with_name("labkit.json")  # not there if PEFT wrote it
    if not file.is_file():
        raise FileNotFoundError(f"{file}; there are {[*map(str, folder.rglob(file.name))]}")
    if hasattr(model, "peft_config"):
        raise ValueError("model: it has adapters already; merge them, or load it again")
    put_back, given = snapshot(model), _made_of(model)
    try:
        made = json.loads(record.read_text())["base"] if record.is_file() else given
        if any(made[key] != given[key] for key in given if key != "weights"):
            raise ValueError(f"made on another base, {made} and not {given}")
        if (made["weights"] == "4-bit") != (given["weights"] == "4-bit"):
            log.warning("folder: the base of %s had other bits than this one (see qlora)", folder)
        with quiet_peft():
            tuned = peft.PeftModel.from_pretrained(model, str(folder))
            keys = tuned.load_adapter(str(folder), "default")  # again, for what did not fit
        soft_prompt = tuned.active_peft_config.is_prompt_learning  # in no list of keys
        wrong = [] if soft_prompt else [*keys.missing_keys, *keys.unexpected_keys]
        wrong += [k for k, w in load_file(file).items() if not w.isfinite().all()]
        if wrong:
            raise ValueError(f"missing, unknown or non-finite weights, such as {wrong[0]}")
    except Exception as error:
        put_back()
        hint = "; import labkit.techniques.adapter first" if "LABKIT" in str(error) else ""
        raise ValueError(f"folder: {folder} does not fit: {str(error)[:300]}{hint}") from error
    return tuned.eval().requires_grad_(False)


def base_model(model: Any) -> Any:
    """The model of transformers under wrappers of PEFT and of distributed training."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def linear_layers(model: Any, head: bool = False) -> dict[str, Any]:
    """All linear layers (also GPT-2's `Conv1D`) by full name; the output head only with `head`."""
    kinds = torch.nn.Linear | transformers.pytorch_utils.Conv1D
    output = None if head else getattr(model, "get_output_embeddings", lambda: None)()
    return {n: m for n, m in model.named_modules() if isinstance(m, kinds) and m is not output}


def blocks(model: Any) -> dict[str, Any]:
    """The transformer's layers by full name, lowest first, whatever the architecture calls them."""
    depth = model.config.get_text_config().num_hidden_layers
    for path, module in model.named_modules():
        if type(module).__name__ == "ModuleList" and len(module) == depth:
            return {f"{path}.{name}": block for name, block in module.named_children()}
    raise ValueError(f"model: expected a list of {depth} layers in a {type(model).__name__}")


def use_float32_attention(model: Any) -> None:
    """Computes attention in float32 also under autocast, where `model` uses the library's `sdpa`.

    On a CPU, bfloat16 attention takes up to eight times as long backward: at 37 tokens a
    forward and backward pass took 21.6 ms in bfloat16, 6.7 ms in float32.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attention(module, query, key, value, attention_mask, **kwargs):
        with torch.autocast(query.device.type, enabled=False):
            q, k, v = query.float(), key.float(), value.float()
            output, weights = sdpa_attention_forward(module, q, k, v, attention_mask, **kwargs)
        return output.to(value.dtype), weights

    if base_model(model).config._attn_implementation == "sdpa":
        transformers.AttentionInterface.register("labkit_float32", attention)
        transformers.AttentionMaskInterface.register("labkit_float32", sdpa_mask)
        base_model(model).set_attn_implementation("labkit_float32")


def context_length(model: Any) -> int | None:
    """Tokens that fit into the model's context, those of a soft prompt or prefix taken off."""
    context = getattr(model.config, "max_position_embeddings", None)
    virtual = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None)
    return context and context - (virtual or 0)


def warn_of_half_precision(model: Any) -> None:
    """Warns if weights that train have two bytes, in which small steps are lost."""
    if any(p.requires_grad and p.itemsize == 2 for p in model.parameters()):
        log.warning("model: small steps are lost in half precision; load it with dtype='float32'")


def fitting(model: Any, max_length: int) -> int:
    """`max_length`, or the tokens of the model's context where that is less."""
    return min(max_length, context_length(model) or max_length)


def cpu_has_bf16() -> bool:
    """Whether this processor multiplies bfloat16 natively; elsewhere it is emulated and slow."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def autocast_dtype(model: Any) -> torch.dtype | None:
    """bfloat16 where autocast pays, else None (train in the weights' own type).

    A CPU needs native bfloat16 and a million parameters: below, casting costs more than it saves.
    """
    kind = next(model.parameters()).device.type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
    pays = cpu_has_bf16() and parameter_counts(model).total >= 1_000_000
    return torch.bfloat16 if kind == "cpu" and pays else None


def autocast(model: Any) -> torch.autocast:
    """The context in which a forward pass computes in `autocast_dtype`."""
    kind, dtype = next(model.parameters()).device.type, autocast_dtype(model)
    return torch.autocast(kind, dtype, enabled=dtype is not None)


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Without PEFT's warnings of a renamed attribute, and of keys, which `load_adapter` checks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpoint.*deprecated|Found missing adapt")
        yield


@contextlib.contextmanager
def no_progress_bar() -> Iterator[None]:
    """Without the bars of transformers for loading and writing weights."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
