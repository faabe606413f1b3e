"""A model from outside, checked: what cannot work is a ValueError that says why, before anything runs."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

DTYPES = ("auto", "float32", "bfloat16", "float16")
TOKENIZER_FILES = ("*token*", "vocab*", "*.model", "tekken.json", "merges.txt")
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"device={name}: choose auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"device={name}: PyTorch sees {count} CUDA devices here; `keysift info` says more")
    return device


def pick_dtype(name: str, device: torch.device) -> Any:
    """``auto`` is the checkpoint's own type on a GPU, and float32 on a CPU, where half types are often slower."""
    if name not in DTYPES:
        raise ValueError(f"dtype={name}: choose {', '.join(DTYPES)}")
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    return getattr(torch, name)


def load(name: str, device: torch.device, dtype: Any, ranks: int = 1) -> tuple[Any, Any]:
    """The causal LM and the tokenizer of a folder or, where there is no such folder, of a Hugging Face hub id.

    With several ``ranks`` each of them calls this, having met the others, and gets its part of the weights.
    """
    for library in ("transformers", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    local, config = is_folder(name), read_config(name)
    if local and not any(Path(name).glob("*.safetensors")):
        raise ValueError(f"model={name} has no safetensors: pickled weights could run anything, so convert them first")
    tokenizer = read_tokenizer(name)
    with one_error(name, "weights", local):
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            local_files_only=local,
            use_safetensors=True,
            **(sharded(ranks) if ranks > 1 else {}),
        )
        model, report = loaded
        model = (model if ranks > 1 else model.to(device)).eval()
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"model={name} lacks {len(missing)} weights, the first is {missing[0]}")
    return model, tokenizer


def read_config(name: str) -> Any:
    """The config of a folder or hub id, which must be that of a causal LM."""
    local = is_folder(name)
    with one_error(name, "configuration", local):
        config = transformers.AutoConfig.from_pretrained(name, local_files_only=local)
    check_causal(name, config)
    return config


def stated_context(name: str) -> int | None:
    """Tokens that the configuration of any model says it takes, one that transformers has no code for too; None where
    it does not say, or stretches them."""
    with one_error(name, "configuration", local := is_folder(name)):
        found, _ = transformers.PretrainedConfig.get_config_dict(name, local_files_only=local)
    if not found:
        raise ValueError(f"cannot load the configuration of model={name}")
    text = found.get("text_config", found)
    stretched = "factor" in (text.get("rope_parameters") or text.get("rope_scaling") or {})
    stated = text.get("max_position_embeddings")
    return stated if isinstance(stated, int) and not stretched else None


def read_tokenizer(name: str) -> Any:
    """The tokenizer of a folder or hub id."""
    local, missing = is_folder(name), "has no tokenizer: its files (tokenizer.json, ...) belong beside config.json"
    if local and not any(any(Path(name).glob(pattern)) for pattern in TOKENIZER_FILES):
        raise ValueError(f"model={name} {missing}")
    with one_error(name, "tokenizer", local):
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(name, local_files_only=local)
    if tokenizer.vocab_size <= len(tokenizer.all_special_tokens):  # what transformers makes up where there are no files
        raise ValueError(f"model={name} {missing}")
    return tokenizer


def sharded(ranks: int) -> dict[str, Any]:
    """Arguments that have transformers load a part of the weights, as its releases call them."""
    try:
        from transformers.distributed.configuration_utils import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_size=ranks, tp_plan="auto")}
    except (ImportError, TypeError):
        return {"tp_plan": "auto"}


def check_ranks(name: str, ranks: int) -> None:
    """Raise ValueError unless a model's KV heads can be dealt out to so many processes."""
    with one_error(name, "configuration", is_folder(name)):
        config = transformers.AutoConfig.from_pretrained(name, local_files_only=is_folder(name)).get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if ranks < 1 or heads % ranks:
        able = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ValueError(f"tensor_parallel={ranks}: the model has {heads} KV heads; choose {able}")


def is_folder(name: str) -> bool:
    """Whether ``name`` is a model folder here; False means that it may be a hub id."""
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model={name} has no config.json: not a Hugging Face model folder")
        return True
    if path.exists():
        raise ValueError(f"model={name} is a file: give the folder that holds it")
    if not HUB_ID.fullmatch(name):
        raise ValueError(f"model={name}: no such folder")
    return False


@contextmanager
def one_error(name: str, part: str, local: bool) -> Iterator[None]:
    """Turn whatever a broken folder or an unreachable hub raises (many types) into one ValueError."""
    try:
        yield
    except Exception as error:
        where = "" if local else " (no such folder here, so looked up on the Hugging Face hub)"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"cannot load the {part} of model={name}{where}: {reason[:300]}") from error


def check_causal(name: str, config: Any) -> None:
    """Refuse encoders and encoder-decoders: transformers would load some of them as causal models with random heads."""
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    known = (causal,) if isinstance(causal, str) else tuple(causal or ())
    stored = tuple(config.architectures or known)
    if getattr(config, "is_encoder_decoder", False) or not set(stored) & set(known):
        what = ", ".join(config.architectures or (config.model_type,))
        raise ValueError(f"model={name} is not a causal language model: its config says {what}")


def chat_text(tokenizer: Any, prompt: str | Sequence[dict[str, str]]) -> str:
    """A prompt, or the turns of a conversation, within the model's chat template, up to where the answer begins,
    special tokens included."""
    if not tokenizer.chat_template:
        raise ValueError("--chat: this model's tokenizer has no chat template; leave --chat out")
    turn = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    try:
        return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates are programs of the checkpoint's
        raise ValueError(f"--chat: the model's chat template fails: {error}") from error


def encode(tokenizer: Any, prompt: str, chat: bool, vocabulary: int) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask``, each ``[1, prompt tokens]``, for a model that knows ``vocabulary`` ids."""
    text = chat_text(tokenizer, prompt) if chat else prompt
    encoded = tokenizer(text, add_special_tokens=not chat, return_tensors="pt")
    token_ids = encoded["input_ids"]
    if token_ids.numel() == 0:
        raise ValueError("the prompt has no tokens")
    if (largest := int(token_ids.max())) >= vocabulary:
        raise ValueError(f"tokenizer and model do not match: token {largest}, but the model knows {vocabulary} tokens")
    return {"input_ids": token_ids, "attention_mask": encoded["attention_mask"]}


def eos_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """What ends an answer, as the model's generation config and its tokenizer say."""
    named: Iterable[Any] = (
        getattr(getattr(model, "generation_config", None), "eos_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
    )
    return frozenset(_flat(named))


def _flat(ids: Iterable[Any]) -> Iterator[int]:
    for x in ids:
        if isinstance(x, (list, tuple)):
            yield from x
        elif x is not None:
            yield int(x)


def check_vocabularies(draft: Any, draft_tokenizer: Any, model: Any, tokenizer: Any) -> None:
    """Raise ValueError unless the tokens of a draft model are those of the model that it drafts for: by their
    tokenizers, or where one has none by how many tokens they know."""
    if draft_tokenizer is not None and tokenizer is not None:
        ours, theirs = tokenizer.get_vocab(), draft_tokenizer.get_vocab()
        same = ours == theirs
    else:
        ours, theirs = (range(x.get_input_embeddings().num_embeddings) for x in (model, draft))
        same = len(ours) == len(theirs)
    if not same:
        raise ValueError(
            f"draft_model: its vocabulary ({len(theirs):,} tokens) is not the model's ({len(ours):,}): drafts are"
            " tokens, so choose a smaller model of the same family"
        )
