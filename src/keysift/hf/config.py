"""What the config of a model says."""

from __future__ import annotations

from typing import Any


def context_tokens(config: Any) -> int | None:
    """How many tokens the model was made for, its RoPE scaling included; None where the config does not say."""
    config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if limit is None or "factor" not in rope:
        return limit
    if rope.get("rope_type") in ("linear", "dynamic"):
        return int(limit * rope["factor"])
    if rope.get("rope_type") == "yarn":
        return max(limit, int(rope.get("original_max_position_embeddings", limit) * rope["factor"]))
    return limit


def rope_types(model: Any) -> set[str]:
    """Kinds of rotary embedding that a model's config names."""
    rope = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = [rope, *(x for x in rope.values() if isinstance(x, dict))]  # of all layers, or of each kind of layer
    return {kind["rope_type"] for kind in kinds if "rope_type" in kind}
