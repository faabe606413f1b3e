"""FlexPrefill's own spelling, for Hugging Face decoders and for engines of vLLM."""

from __future__ import annotations

from typing import Any

from keysift.hf.attach import Attachment, attach
from keysift.vllm_plugin.patch import PatchedEngine

PATTERNS = ("default", "flash", "dense", "streaming_llm", "minfer", "vertical_slash", "flex_prefill")


def patch_model(
    model: Any, pattern: str = "flex_prefill", config: dict[str, Any] | None = None
) -> Attachment | PatchedEngine:
    """FlexPrefill's own spelling of ``attach``: its pattern and config names.

    Args:
        model: a Hugging Face decoder, or a ``vllm.LLM`` that serves nobody at the moment.
        pattern: default or flash (dense), streaming_llm (global_window, local_window), minfer or vertical_slash
            (block_size, vertical_size, slash_size), flex_prefill (block_size, flex_prefill_gamma, _tau, _min_budget,
            _max_budget).
        config: values for those names, in tokens; missing ones take the authors' defaults.

    Raises:
        ValueError: unknown pattern or name, bad value, unsupported model.
    """
    names: dict[str, dict[str, tuple[str, Any]]] = {
        "dense": {},
        "streaming": {"global_window": ("sinks", 1024), "local_window": ("window", 8192)},
        "minference": {
            "block_size": ("block", 128),
            "vertical_size": ("vertical", 1000 if pattern == "minfer" else 8192),
            "slash_size": ("slash", 6096 if pattern == "minfer" else 8192),
        },
        "flexprefill": {
            "block_size": ("block", 128),
            "flex_prefill_gamma": ("gamma", 0.9),
            "flex_prefill_tau": ("tau", 0.1),
            "flex_prefill_min_budget": ("min_budget", 1024),
            "flex_prefill_max_budget": ("max_budget", None),
        },
    }
    if pattern not in PATTERNS:
        raise ValueError(f"pattern '{pattern}' unknown: choose {', '.join(PATTERNS)}")
    method = {"streaming_llm": "streaming", "flex_prefill": "flexprefill"}.get(
        pattern, "minference" if pattern in ("minfer", "vertical_slash") else "dense"
    )
    known = names[method]
    if unknown := set(config or {}) - set(known):
        raise ValueError(f"{pattern} has no option '{min(unknown)}': choose {', '.join(known) or 'none'}")
    values = {ours: (config or {}).get(theirs, default) for theirs, (ours, default) in known.items()}
    spec = f"{method}:{','.join(f'{k}={v}' for k, v in values.items())}"
    return PatchedEngine(model, spec) if hasattr(model, "llm_engine") else attach(model, prefill=spec)
