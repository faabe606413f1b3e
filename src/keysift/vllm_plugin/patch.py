"""Another prefill method for an engine of vLLM that runs already, as FlexPrefill's ``patch_model`` has it.

Steps stay as they are. Where vLLM computes with its own backend on a GPU, its cache stays its own too: graphs of steps
read it. On a CPU, where keys are packed for its kernels, layers get the cache anew.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch import Tensor

from keysift.vllm_plugin.batch import Batches
from keysift.vllm_plugin.layer import DENSE, LayerAttention
from keysift.vllm_plugin.options import Options, check_engine, prefill_of
from keysift.vllm_plugin.pages import PageLayout, Pages
from keysift.vllm_plugin.versions import flash_attention, names, unsupported

BACKENDS = ("FLASH_ATTN", "CPU_ATTN", "CUSTOM")  # whose caches and metadata are known


class PatchedEngine:
    """A ``vllm.LLM`` that reads prompts by another method, until ``detach`` or the end of a ``with``."""

    def __init__(self, engine: Any, spec: str) -> None:
        """Patch it.

        Raises:
            ValueError: a vLLM that is not supported, requests that are being served, or a layer that cannot be.
        """
        if reason := unsupported():
            raise ValueError(reason)
        prefill_of(spec)
        self._engine, self._spec = engine, spec
        self._use(spec)

    def _use(self, spec: str | None) -> None:
        if self._engine.llm_engine.has_unfinished_requests():
            raise ValueError("requests are being served: patch an engine that has none")
        reasons = [reason for reason in self._engine.collective_rpc("keysift_use_prefill", args=(spec,)) if reason]
        if reasons:
            self._engine.collective_rpc("keysift_use_prefill", args=(None,))  # no process alone
        self._engine.reset_prefix_cache()  # what was read otherwise, or lies otherwise
        if reasons:
            raise ValueError(reasons[0])

    def detach(self) -> None:
        """Read prompts as before."""
        self._use(None)

    def __enter__(self) -> PatchedEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.detach()
        except Exception as why:
            if error is None:
                raise
            error.add_note(f"keysift: prompts are still read by {self._spec}: {why}")


def use_prefill(worker: Any, spec: str | None) -> str:
    """Have the layers of a worker read prompts by a method, or as they did before; what ``register`` adds to vLLM's
    workers. Why it cannot be, or nothing."""
    from keysift.vllm_plugin.backend import Impl

    context = worker.vllm_config.compilation_config.static_forward_context
    layers = {name: layer for name, layer in context.items() if isinstance(layer, names().Attention)}
    if not layers:
        return "this engine has no layers of attention that can read prompts otherwise"
    impls: dict[str, Any] = {}
    try:
        if spec is not None:
            check_engine(worker.vllm_config)
        for name, layer in layers.items():
            if not isinstance(layer.impl, Impl):
                stock = layer.impl.stock if isinstance(layer.impl, Patched) else layer.impl
                impls[name] = stock if spec is None else _patched(worker.vllm_config, name, layer, stock, spec)
    except ValueError as error:
        return str(error)
    for name, layer in layers.items():
        if name in impls:
            layer.impl = impls[name]
        else:
            attention = layer.impl.attention(layer)
            attention.prefill = layer.impl.options.prefill if spec is None else prefill_of(spec)
    return ""


def _patched(vllm_config: Any, name: str, layer: Any, stock: Any, spec: str) -> Patched:
    """An implementation that reads prompts by a method, in the place of vLLM's own."""
    from keysift.vllm_plugin.backend import layer_of, refuse

    backend = layer.attn_backend.get_name()
    if backend not in BACKENDS:
        raise ValueError(f"patch_model cannot patch {backend}: start vLLM with --attention-backend FLASH_ATTN")
    refuse(
        softcap=getattr(stock, "logits_soft_cap", None),
        alibi=getattr(stock, "alibi_slopes", None),
        shared=layer.kv_sharing_target_layer_name,
        attn_type=layer.attn_type,
        others={"sinks": getattr(stock, "sinks", None)},
    )
    options = Options(prefill_of(spec), DENSE)
    return Patched(stock, layer_of(vllm_config, name, stock.scale, layer), options, layer.kv_cache)


class Patched:
    """In the place of a layer's own implementation, which it asks for whatever is not said here."""

    def __init__(self, stock: Any, layer: Any, options: Options, cache: Tensor) -> None:
        self.stock = stock
        self.layout = PageLayout(cache.shape[2], layer.kv_heads, layer.dim, layer.v_dim, cache.dtype, options.decode)
        self._packed = cache.device.type == "cpu"
        flash, views = flash_attention(layer.dim), None if self._packed else self._views
        self.attention = LayerAttention(layer, options, flash, views)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["stock"], name)

    def _views(self, cache: Tensor) -> Pages:
        """Keys and values as vLLM's FlashAttention has them: side by side."""
        k, v = cache.transpose(1, 2).split([self.layout.dim, self.layout.v_dim], -1)
        return Pages(k, v, {}, {})

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        if self._packed:
            self.attention.write(kv_cache, key, value, slot_mapping)
        else:
            self.stock.do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Any,
        output: Tensor, *others: Any, **more: Any,
    ) -> Tensor:  # fmt: skip
        """Attention of a batch; of one without prompts, vLLM's own where that can read the cache."""
        if attn_metadata is None or (not self._packed and attn_metadata.max_query_len <= 1):
            return self.stock.forward(layer, query, key, value, kv_cache, attn_metadata, output, *others, **more)
        self.attention.attend(query, kv_cache, self._batch(attn_metadata), output)
        return output

    def _batch(self, metadata: Any) -> Any:
        """The batch, in our words; made once for all layers alike, for it waits for the device."""
        known = getattr(metadata, "_keysift", None)
        if known is None:
            starts, ends = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
            batches = Batches(self.layout, len(ends), metadata.seq_lens.device)
            known = batches.batch(starts, ends, metadata.seq_lens, metadata.block_table, metadata.max_seq_len)
            metadata._keysift = known
        return known
