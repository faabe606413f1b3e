"""What vLLM calls: its classes, each of which hands over to ``batch`` or ``layer``."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from keysift.attention import LIST_BYTES
from keysift.vllm_plugin.batch import Batch, Batches, round_lengths
from keysift.vllm_plugin.layer import DENSE, Layer, LayerAttention, method_of
from keysift.vllm_plugin.options import BLOCK_SIZE, Options, options_of
from keysift.vllm_plugin.pages import PageLayout
from keysift.vllm_plugin.versions import enlarge_page, flash_attention, layouts, names
from keysift.vllm_plugin.warm_up import Layers, rehearse, warm_up

vllm = names()
WORKSPACE = 2 * LIST_BYTES  # of a sparse prefill, which the profiling run must see


class Backend(vllm.Backend):  # type: ignore[name-defined]
    """What vLLM asks before it makes layers."""

    forward_includes_kv_cache_update: ClassVar[bool] = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16", "float32"]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type:
        return Impl

    @staticmethod
    def get_builder_cls() -> type:
        return Builder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [vllm.MultipleOf(16)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        return max(default_block_size, BLOCK_SIZE)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def indexes_kv_by_block_stride(cls) -> bool:
        """Before 0.30: pages may lie apart, which lets layers with windows have smaller ones."""
        return True

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...] | None:
        """From 0.30 on."""
        return layouts()

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        """Before 0.30; what lies in a page is ours to say."""
        return num_blocks, num_kv_heads, block_size, 2 * head_size


def layout_of(options: Options, spec: Any) -> PageLayout:
    """Of a page of layers with this spec.

    Raises:
        ValueError: pages that the decode method cannot divide.
    """
    v_dim = getattr(spec, "head_size_v", None) or spec.head_size
    method = method_of(options, getattr(spec, "sliding_window", None))
    if method != DENSE and spec.block_size % (unit := options.unit(spec.head_size)):
        raise ValueError(f"this model's pages are of {spec.block_size} tokens: {unit} must divide them for this method")
    return PageLayout(spec.block_size, spec.num_kv_heads, spec.head_size, v_dim, spec.dtype, method)


def page_bytes(vllm_config: Any, spec: Any) -> int | None:
    """Bytes of a page of layers with this spec; None to leave it as it is."""
    layout = layout_of(options_of(vllm_config), spec)
    return None if layout.method == DENSE else layout.bytes


enlarge_page(Backend, page_bytes)


class Builder(vllm.Builder):  # type: ignore[name-defined]
    """Metadata of batches, for layers whose pages are counted together."""

    _cudagraph_support = vllm.CUDAGraphSupport.UNIFORM_SINGLE_TOKEN_DECODE
    reorder_batch_threshold: int | None = 1

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.longest = int(vllm_config.model_config.max_model_len)
        self.most_tokens = int(vllm_config.scheduler_config.max_num_batched_tokens)
        self.device, self._is_warm = device, not compiles(device)
        captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        most = max(vllm_config.scheduler_config.max_num_seqs, captured)
        self.batches = Batches(layout_of(options_of(vllm_config), kv_cache_spec), most, device)
        layers = vllm_config.compilation_config.static_forward_context
        self.layers = [layers[name] for name in layer_names]
        for layer in self.layers:  # what cannot be computed is refused before anybody asks for it
            layer.impl.attention(layer)
            layer.impl.builder = self

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Batch:
        """A batch; side data of first pages that the steps of the last one have filled are made now."""
        self.warm_up(common_attn_metadata.block_table_tensor)
        filled, self.batches.filled = self.batches.filled, None
        if filled is not None:
            for layer in self.layers:
                layer.impl.attention(layer).complete(layer.kv_cache, filled)
        return batch_of(self.batches, common_attn_metadata, self.longest)

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Batch:
        """Steps that are replayed at any length."""
        common, table = common_attn_metadata, common_attn_metadata.block_table_tensor
        self.warm_up(table)
        batch = Batch(common.num_reqs, self.batches.steps(common.seq_lens, table, self.longest), [])
        if compiles(self.device):  # nothing can be compiled within a graph
            rehearse(self._kinds(), batch, batch.count)
        return batch

    def warm_up(self, table: Tensor | None = None) -> None:
        """Compile kernels, the first time that it is called: when there is a cache, and nobody waits."""
        if not self._is_warm:
            self._is_warm = True
            if table is None:  # none is known: what sequences need is the layout
                table = torch.empty(1, 0, dtype=torch.int32, device=self.device)
            warm_up(self._kinds(), self.batches, self.longest, self.most_tokens, table)

    def _kinds(self) -> Layers:
        each = {layer.impl.attention(layer).reads_all: layer for layer in self.layers}
        return [(layer.impl.attention(layer), layer.kv_cache, layer.num_heads) for layer in each.values()]


def compiles(device: torch.device) -> bool:
    """Whether kernels are compiled when they are needed."""
    return device.type == "cuda"


def batch_of(batches: Batches, common: Any, longest: int) -> Batch:
    """A batch as vLLM tells of it, of sequences of at most ``longest`` tokens.

    On a GPU kernels are told round lengths: others would be other kernels.
    """
    ends = common.seq_lens_cpu_upper_bound  # exact where a sequence has more than one new token
    ends = (common.seq_lens.cpu() if ends is None else ends)[: common.num_reqs].tolist()
    starts = common.query_start_loc_cpu[: common.num_reqs + 1].tolist()
    lengths, table = common.seq_lens[: common.num_reqs], common.block_table_tensor
    most = int(common.max_seq_len)
    if lengths.is_cuda:
        most = next((length for length in round_lengths(longest) if length >= most), longest)
    return batches.batch(starts, ends, lengths, table, most, common.is_prefilling)


class Impl(vllm.Impl):  # type: ignore[name-defined]
    """Attention of a layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        **others: Any,
    ) -> None:
        """As vLLM makes it.

        Raises:
            ValueError: what keysift's attention does not compute; says what it is.
        """
        refuse(logits_soft_cap, alibi_slopes, kv_sharing_target_layer_name, attn_type, others)
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype, self.sliding_window = kv_cache_dtype, sliding_window
        self._config = vllm.current_config()
        self.options = options_of(self._config)
        self._attention: LayerAttention | None = None
        self.builder: Builder | None = None  # once there is one

    def attention(self, layer: Any) -> LayerAttention:
        """What computes it."""
        if self._attention is None:
            shape = layer_of(self._config, layer.layer_name, self.scale, layer)
            self._attention = LayerAttention(shape, self.options, flash_attention(self.head_size))
        return self._attention

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write the keys and values of a batch into their pages."""
        self.attention(layer).write(kv_cache, key, value, slot_mapping)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Batch | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of a batch, query ``[T, H, D]``, whose keys are in the cache; writes ``output``, ``[T, H, Dv]``."""
        if output_scale is not None or output_block_scale is not None:
            raise ValueError("keysift's attention does not quantise its output: turn fused output quantisation off")
        if attn_metadata is None:  # nobody waits for this
            if kv_cache.numel() and self.builder is not None:
                self.builder.warm_up()
            elif query.is_cuda and self.options.prefill != DENSE:  # profiling must see what a long prompt takes
                torch.empty(WORKSPACE, dtype=torch.uint8, device=query.device)
            return output.fill_(0)
        self.attention(layer).attend(query, kv_cache, attn_metadata, output)
        return output


def refuse(softcap: float | None, alibi: Any, shared: str | None, attn_type: str, others: dict[str, Any]) -> None:
    """Raise ValueError for what keysift's attention does not compute; says what it is."""
    sinks = others.pop("sinks", None)
    refused = {
        "softcapped logits": softcap,
        "ALiBi": alibi is not None,
        "keys that layers share": shared,
        f"attention of type {attn_type}": attn_type != vllm.AttentionType.DECODER,
        "attention sinks as parameters": sinks is not None,
        ", ".join(others): any(value is not None for value in others.values()),
    }
    for what, asked in refused.items():
        if asked:
            raise ValueError(f"keysift's attention does not serve this model: it has {what}")


def layer_of(vllm_config: Any, name: str, scale: float, layer: Any) -> Layer:
    """A layer of vLLM's by its name.

    Raises:
        ValueError: attention of another kind; says which.
    """
    if type(layer) is not vllm.Attention:
        raise ValueError(f"keysift's attention does not serve this model: it has layers of {type(layer).__name__}")
    heads, sharing = vllm_config.model_config.get_total_num_kv_heads(), vllm_config.parallel_config.tensor_parallel_size
    first_head = vllm.tensor_parallel_rank() * heads // sharing if sharing > 1 else 0
    number = int(vllm.extract_layer_index(name))
    v_dim = getattr(layer, "head_size_v", None) or layer.head_size
    if v_dim != layer.head_size:
        raise ValueError(
            f"keysift's attention does not serve this model: it has keys of {layer.head_size} and values of {v_dim}"
        )
    return Layer(number, layer.num_kv_heads, layer.head_size, v_dim, float(scale), layer.sliding_window, first_head)
