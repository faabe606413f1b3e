"""What a user says about keysift to vLLM, and what of vLLM does not go with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from keysift.methods import parse
from keysift.types import check_seed

SECTION = "keysift"  # of --additional-config
BLOCK_SIZE = 128  # tokens a page, where the user says nothing
DECODES = ("dense", "magicpig", "quest", "signbits", "streaming")  # what they keep of a key fits beside it in its page


@dataclass(frozen=True, slots=True)
class Options:
    """The methods of a server.

    Attributes:
        prefill: method that reads prompts.
        decode: method that reads the keys of decode steps.
        seed: of its draws.
    """

    prefill: Any
    decode: Any
    seed: int = 0

    @classmethod
    def of(cls, section: Any) -> Options:
        """Options as ``--additional-config '{"keysift": ...}'`` gives them.

        Raises:
            ValueError: an unknown option, or a method that cannot serve; says what there is.
        """
        if not isinstance(section, Mapping):
            raise ValueError(f"{SECTION}={section!r}: write an object, such as " + '{"decode": "quest:keep=0.05"}')
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(map(str, section)) - set(known)):
            raise ValueError(f"keysift has no option '{unknown[0]}' in vLLM: choose {', '.join(known)}")
        for name in ("prefill", "decode"):
            if not isinstance(section.get(name, ""), str):
                raise ValueError(f"{name}={section[name]!r}: write a SPEC, such as flexprefill:gamma=0.95")
        check_seed(section.get("seed", 0))
        options = cls(
            prefill_of(section.get("prefill", "dense")),
            parse(section.get("decode", "dense"), "decode"),
            section.get("seed", 0),
        )
        options._check_decode()
        return options

    def _check_decode(self) -> None:
        name = type(self.decode).__module__.rpartition(".")[2]
        if name not in DECODES:
            raise ValueError(f"decode method '{name}' cannot serve in vLLM: choose {', '.join(DECODES)}")
        if getattr(self.decode, "match", "bits") != "bits":
            raise ValueError("magicpig: match=tables keeps tables of each sequence, vLLM pages of keys: use match=bits")
        if not self.decode.grows:
            raise ValueError(
                "magicpig: mode=seed never hashes generated tokens, vLLM cannot tell them: use the default"
            )

    def unit(self, head_dim: int) -> int:
        """Tokens that a page must have a multiple of.

        Raises:
            ValueError: a method that cannot serve keys of this head dim.
        """
        return math.lcm(16, *(side.unit for side in self.decode.sides(head_dim, torch.bfloat16).values()))


def prefill_of(spec: str) -> Any:
    """The method that reads prompts.

    Raises:
        ValueError: no such method, or one that cannot read a prompt in parts.
    """
    method = parse(spec, "prefill")
    if getattr(method, "mode", "default") == "seed":
        raise ValueError("flexprefill: mode=seed reads prompts whole, vLLM hands them over in parts: use the default")
    return method


def options_of(vllm_config: Any) -> Options:
    """The options in a configuration of vLLM, checked; dense methods where it has none."""
    additional = vllm_config.additional_config
    return Options.of(additional.get(SECTION, {}) if isinstance(additional, Mapping) else {})


def check(vllm_config: Any, selected: bool) -> None:
    """Raise ValueError for options that are wrong and, if keysift's backend is ``selected``, for what of vLLM does not
    go with it."""
    additional = vllm_config.additional_config
    if not selected:
        if isinstance(additional, Mapping) and SECTION in additional:
            raise ValueError("options for keysift without its attention: add --attention-backend CUSTOM")
        return
    options, model = options_of(vllm_config), vllm_config.model_config
    check_engine(vllm_config)
    dim = model.get_head_size()
    unit = options.unit(dim)
    if getattr(options.decode, "keep_bytes", None) is not None:
        options.decode.share_to_read(dim, dim, model.dtype)
    cache = vllm_config.cache_config
    if cache.user_specified_block_size and cache.block_size % unit:
        raise ValueError(f"--block-size {cache.block_size}: these methods take multiples of {unit}")


def check_engine(vllm_config: Any) -> None:
    """Raise ValueError for what of vLLM no attention of keysift's goes with."""
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    dtypes = ("auto", str(vllm_config.model_config.dtype).removeprefix("torch."))
    refused = {
        "speculative decoding (--speculative-config)": vllm_config.speculative_config is not None,
        "KV connectors (--kv-transfer-config)": vllm_config.kv_transfer_config is not None,
        "keys and values in host memory (--kv-offloading-size)": getattr(cache, "kv_offloading_size", None) is not None,
        f"a KV cache in {cache.cache_dtype} (--kv-cache-dtype)": cache.cache_dtype not in dtypes,
        "decode context parallelism": parallel.decode_context_parallel_size > 1,
        "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "dual-batch overlap (--enable-dbo)": getattr(parallel, "enable_dbo", False),
        "batches in parts (--ubatch-size)": getattr(parallel, "ubatch_size", 0) > 1,
    }
    for what, asked in refused.items():
        if asked:
            raise ValueError(f"keysift's attention does not serve {what}: leave it out")
