"""Any Hugging Face decoder: our attention function and mask function behind transformers' own interfaces."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from keysift import attention as path
from keysift.cache import Store
from keysift.hf.cache import adopt
from keysift.hf.hybrid import TAKEN, HybridLayer
from keysift.meter import Meter
from keysift.methods import dense, parse
from keysift.offload import HostMemory, HostTier, OffloadedStore
from keysift.types import KV, Ctx, check_seed, one_of

NAME = "keysift"
SHORT_RUN = 16  # outside a prompt, so few queries read all keys: a verification pass, where dense costs little
DENSE = dense.Method()
READINGS = ("sparse", "dense", "decode")
KV_DEVICES = ("gpu", "cpu")


class Mask(NamedTuple):
    """What the mask function tells the attention function, once per forward pass and kind of layer.

    Attributes:
        start, end: valid keys of each sequence among those passed to attention; None means all.
        window: sliding window in tokens; None means unlimited.
    """

    start: list[int] | None
    end: list[int] | None
    window: int | None

    def contiguous(self) -> Mask:
        """What ``generate`` calls on masks that it prepares for a static cache."""
        raise ValueError("keysift does not support StaticCache: pass a DynamicCache or keysift.KVCache, or none")


class RunStats(NamedTuple):
    """What the model has read since it was attached, or ``reset_stats``; layers with a window of their own not counted.

    Attributes:
        prefill_density: share of the causal triangle read in prefill; None before one.
        kept_fraction: share of the cached keys read in decode; None before a step.
        bytes_per_step: bytes of keys, values and side data read in decode for one token of one sequence.
        prefill_error, decode_error: relative error of the attention output (see ``Stats``); None unless measured.
        mass_covered: attention mass on the blocks that prefill read, over a few query rows; None unless measured.
    """

    prefill_density: float | None
    kept_fraction: float | None
    bytes_per_step: float | None
    prefill_error: float | None
    decode_error: float | None
    mass_covered: float | None = None


@dataclass(eq=False)
class Attachment:
    """Methods at work in a model. As a context manager it detaches at the end.

    One ``generate()`` at a time: prompt and steps of two threads on one model could not be told apart.
    """

    model: PreTrainedModel
    prefill: Any
    decode: Any
    seed: int = 0
    kv_device: str = "gpu"
    host_memory: int | None = None
    select_device: str = "auto"
    meter: Meter = field(default_factory=Meter)
    in_prompt: bool = False  # transformers is inside its prefill, in however many chunks
    how: str | None = None  # set by `reading`
    _undo: list[Callable[[], object]] = field(default_factory=list)

    @property
    def stats(self) -> RunStats:
        measured = self.meter.stats()
        return RunStats(
            measured.density,
            measured.kept_fraction,
            measured.bytes_per_step,
            measured.prefill_error,
            measured.decode_error,
            measured.mass_covered,
        )

    def reset_stats(self, measure_error: bool = False, measure_mass: bool = False) -> None:
        """Start counting anew.

        Args:
            measure_error: also compute dense attention beside the methods' (slow).
            measure_mass: also attend densely with a few query rows of each prefill, to see what its blocks cover.
        """
        self.meter = Meter(measure_mass, measure_error)

    @contextmanager
    def reading(self, how: str) -> Iterator[None]:
        """Say how the tokens given to the model within it are read, instead of telling by the shape of the call.

        Args:
            how: "sparse", a prompt for the prefill method; "dense", a prompt for dense attention; "decode", what
                follows a prompt: a token at a time by the decode method, several at once by dense attention.
        """
        one_of("how", how, READINGS)
        before, self.how = self.how, how
        try:
            yield
        finally:
            self.how = before

    @property
    def reads_prompt(self) -> bool:
        return self.in_prompt if self.how is None else self.how != "decode"

    def detach(self) -> None:
        """Give the model back as it was before, newer attachments undone first. Safe to call twice."""
        while self._undo and (newest := self.model.__dict__["_keysift"]) is not self:
            newest.detach()
        while self._undo:
            self._undo.pop()()

    def __deepcopy__(self, memo: Any) -> Attachment:
        raise ValueError("this model is attached: call keysift.detach(model) before copying or pickling it")

    def __reduce__(self) -> Any:
        return self.__deepcopy__(None)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()


def attach(
    model: PreTrainedModel,
    prefill: Any = "dense",
    decode: Any = "dense",
    *,
    seed: int = 0,
    kv_device: str = "gpu",
    host_memory: int | None = None,
    select_device: str = "auto",
) -> Attachment:
    """Run a model's attention through keysift: ``with attach(model, prefill=SPEC, decode=SPEC): model.generate(...)``.

    Without ``with`` it stays until ``detach``. Attaching again replaces the methods until that attachment is detached.

    Args:
        model: a Hugging Face decoder; its weights and its code stay as they are.
        prefill, decode: SPECs such as "flexprefill:gamma=0.95" and "magicpig:K=10,L=150", or method objects.
        seed: of the methods' random draws.
        kv_device: "gpu": keys and values are where the model is; "cpu": in host memory, whose rows the CPU attends to,
            but for sinks, window and layers that the method reads densely (arXiv:2410.16179).
        host_memory: bytes that they may take there; None for what is free. A prompt that needs more is refused with
            a MemoryError before it is read.
        select_device: where side data are kept and rows selected with kv_device="cpu": "gpu", where the model is;
            "cpu"; or "auto": the first, which is faster, if it has the memory and the method needs no keys to select.

    Raises:
        ValueError: unknown method or option, or a model or cache kind that cannot be served correctly; says which.
    """
    check_seed(seed)
    one_of("kv_device", kv_device, KV_DEVICES)
    methods = parse(prefill, "prefill"), parse(decode, "decode")
    HostTier(methods[1], HostMemory(host_memory), select_device)
    link = Attachment(model, *methods, seed, kv_device, host_memory, select_device)
    modules = attention_modules(model)
    refuse_unsupported(model, modules)
    implementations = {id(m.config): (m, m.config._attn_implementation) for m in reversed(_submodels(model))}
    for holder in (model, *modules):
        _set(holder, "_keysift", link, link._undo)
    if hasattr(model, "_prefill"):
        _set(model, "_prefill", _noting_prompts(vars(model).get("_prefill") or model._prefill, link), link._undo)
    for module in modules:
        hook = module.register_forward_pre_hook(_adopt_cache, with_kwargs=True)
        link._undo.append(hook.remove)
    if model.config._attn_implementation != NAME:
        model.set_attn_implementation(NAME)
        for submodel, name in implementations.values():  # undone from the last, the whole model, to its parts
            link._undo.append(functools.partial(submodel.set_attn_implementation, name))
    return link


def detach(model: PreTrainedModel) -> None:
    """Undo every ``attach`` of a model; does nothing where there is none."""
    while (link := getattr(model, "__dict__", {}).get("_keysift")) is not None:
        link.detach()


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query ``[B, H, T, D]``; key and value ``[B, K, S, *]``, those of the cache first.

    Returns:
        Output ``[B, T, H, Dv]``, contiguous, and no attention weights.
    """
    refuse_arguments(module, dropout, kwargs)
    link: Attachment | None = module.__dict__.get("_keysift")
    store: Any = getattr(key, "_keysift_store", None)
    if store is not getattr(value, "_keysift_store", None):
        raise ValueError(f"{type(module).__name__} rearranges cached keys or values: this model is not supported")
    if isinstance(store, HybridLayer):
        return _hybrid_step(module, query.transpose(1, 2), store, link, attention_mask, scaling), None
    if isinstance(store, OffloadedStore):
        return _offloaded(module, query.transpose(1, 2), store, link, attention_mask, scaling), None
    if not isinstance(attention_mask, Mask):  # a mask of the user's or the model's own: exact, by torch SDPA
        if attention_mask is None and getattr(module, "is_causal", True) and query.shape[2] > 1:
            raise ValueError(f"{type(module).__name__} passes no mask to keysift: this model is not supported")
        if store is not None and query.shape[2] > 1:
            store.end_prefill(query.transpose(1, 2), link.decode.tail if link else 0)
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    q, scale = query.transpose(1, 2), query.shape[-1] ** -0.5 if scaling is None else scaling
    layer, seed = getattr(module, "layer_idx", 0), link.seed if link else 0
    if store is not None and store.slots is not None and not store.slots.in_one_piece:
        return _paged_step(module, q, store, link, attention_mask, Ctx(layer, scale, store.slots.positions, seed)), None
    kv = _view(key, value, attention_mask, store)
    ctx = Ctx(layer, scale, kv.length - 1, seed)
    if link is None or attention_mask.window is not None:
        out = _prefill(q, kv, DENSE, ctx, Meter(), attention_mask)
    elif q.shape[1] == 1 < kv.k.shape[1] and not link.reads_prompt and (store is not None or link.decode != DENSE):
        if store is None:
            raise ValueError(f"{type(module).__name__} hides its cache from keysift: only dense decode can serve it")
        out = path.decode(q[:, 0], store, link.decode, ctx, link.meter)[0][:, None]
    else:
        past = key.shape[2] - query.shape[2]
        verifying = past > 0 and not link.reads_prompt and (q.shape[1] <= SHORT_RUN or link.how == "decode")
        method = DENSE if verifying or link.how == "dense" else link.prefill
        out = _prefill(q, kv, method, ctx, link.meter, attention_mask)
        if store is not None and not verifying:
            store.end_prefill(q, link.decode.tail)
    return out.contiguous(), None


def mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> Mask | Tensor | None:
    """What transformers calls to make a mask; causal and sliding-window ones need no tensor, any other becomes one."""
    plain = mask_function is causal_mask_function
    if not plain and not _is_sliding_window(mask_function):
        kwargs["allow_is_causal_skip"] = False
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            **kwargs,
        )
    window = None if plain else local_size
    valid = None if attention_mask is None else attention_mask[:, kv_offset : kv_offset + kv_length].bool().cpu()
    if valid is None or bool(valid.all()) and valid.shape[1] >= kv_length:
        return Mask(None, None, window)
    if valid.shape[1] < kv_length:
        raise ValueError(
            f"the attention mask has {valid.shape[1]} tokens for {kv_length} keys: pass one for the whole sequence, and"
            " a DynamicCache or keysift.KVCache (StaticCache is not supported)"
        )
    count = valid.sum(1)
    start = torch.where(count > 0, valid.int().argmax(1), kv_length)
    end = start + count
    for b in range(batch_size):
        fresh = q_offset == 0 and q_length == kv_length
        if not bool(valid[b, start[b] : end[b]].all()) or count[b] and end[b] < kv_length and not fresh:
            raise ValueError(f"the attention mask of sequence {b} has a hole between its tokens: pad on the left")
    return Mask(start.tolist(), end.tolist(), window)


AttentionInterface.register(NAME, attention_function)
AttentionMaskInterface.register(NAME, mask_function)


def _paged_step(module: nn.Module, q: Tensor, store: Store, link: Attachment | None, mask: Mask, ctx: Ctx) -> Tensor:
    """A decode step over paged slots; what is captured is not counted."""
    if mask.window is not None or q.shape[1] > 1 or store.slots is None:
        what = "sliding windows" if mask.window is not None else f"{q.shape[1]} tokens at once"
        raise ValueError(f"{type(module).__name__}: paged slots take one token a step, without {what}")
    method, meter = (DENSE, Meter()) if link is None else (link.decode, link.meter)
    return path.decode(q[:, 0], store, method, ctx, meter if store.slots.lengths_are_known else None)[0][:, None]


def _hybrid_step(
    module: nn.Module, q: Tensor, store: HybridLayer, link: Attachment | None, mask: Any, scaling: float | None
) -> Tensor:
    """A decode step over rows on the host, of one of several batches in flight."""
    if link is None or not isinstance(mask, Mask) or mask.window is not None or q.shape[1] > 1:
        raise ValueError(f"{type(module).__name__}: steps over host memory take one token, and no mask but our own")
    scale, layer = q.shape[-1] ** -0.5 if scaling is None else scaling, getattr(module, "layer_idx", 0)
    return store.attend(q[:, 0], link.decode, Ctx(layer, scale, torch.zeros(0), link.seed))[:, None]


def _offloaded(
    module: nn.Module, q: Tensor, store: OffloadedStore, link: Attachment | None, mask: Any, scaling: float | None
) -> Tensor:
    """Attention of a layer whose rows live on the host."""
    if link is None or not isinstance(mask, Mask) or mask.window is not None:
        raise ValueError(f"{type(module).__name__}: a cache of kv_device=cpu needs keysift's own causal masks")
    scale, layer = q.shape[-1] ** -0.5 if scaling is None else scaling, getattr(module, "layer_idx", 0)
    store.pad(mask.start or [0] * len(q))
    store.check(link.decode)
    if q.shape[1] == 1 < store.length and not link.reads_prompt:
        store.drop_old()
        ctx = Ctx(layer, scale, torch.zeros(0), link.seed)
        return path.decode_offloaded(q[:, 0], store, link.decode, ctx, link.meter)[:, None]
    kv = store.whole()
    if mask.start is not None and mask.end is not None:
        kv = KV.on(kv.k[:, : store.length], kv.v[:, : store.length], zip(mask.start, mask.end, strict=True))
    ctx = Ctx(layer, scale, kv.length - 1, link.seed)
    verifying = store.length > q.shape[1] and not link.reads_prompt
    method = DENSE if verifying or link.how == "dense" else link.prefill
    out = _prefill(q, kv, method, ctx, link.meter, mask)
    if not verifying:
        store.end_prefill(q, ctx)
    return out.contiguous()


def _prefill(q: Tensor, kv: KV, method: Any, ctx: Ctx, meter: Meter, mask: Mask) -> Tensor:
    """``attention.prefill``; sequences padded on the right are cut out first, each with queries of its own."""
    spans = list(zip(mask.start or (), mask.end or (), strict=True))
    if all(s >= e or e == kv.k.shape[1] for s, e in spans):
        return path.prefill(q, kv, method, ctx, meter, window=mask.window)[0]
    out = q.new_zeros(*q.shape[:3], kv.v.shape[-1])
    for b, (s, e) in enumerate(spans):
        if s < e:
            one = ctx._replace(positions=ctx.positions[b : b + 1])
            out[b, s:e] = path.prefill(q[b : b + 1, s:e], kv.only(b), method, one, meter, window=mask.window)[0][0]
    return out


def _view(key: Tensor, value: Tensor, mask: Mask, store: Store | None) -> KV:
    """The valid keys and values; the store is told where its sequences start."""
    k, v = key.transpose(1, 2), value.transpose(1, 2)
    if mask.start is not None and mask.end is not None:
        kv = KV.on(k, v, zip(mask.start, mask.end, strict=True))
    else:
        kv = KV.of(k, v)
    if store is not None and store.slots is not None:
        store.slots.pad(mask.start or [0] * len(store.slots))
    return kv


def _is_sliding_window(function: Callable[..., Any]) -> bool:
    """Whether a mask function is transformers' causal sliding window and nothing more."""
    cells: tuple[Any, ...] = getattr(function, "__closure__", None) or ()
    parts: Any = cells[0].cell_contents if len(cells) == 1 else None
    return (
        isinstance(parts, tuple)
        and len(parts) == 2
        and parts[1] is causal_mask_function
        and getattr(parts[0], "__qualname__", "").startswith("sliding_window_overlay.")
        and function.__qualname__.startswith("and_masks.")
    )


def attention_modules(model: nn.Module) -> list[nn.Module]:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{type(model).__name__} is not a transformers model: pass what AutoModelForCausalLM loads, not a wrapper"
        )
    return [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal")]


def _submodels(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The model and its parts that have a config of their own (text and vision, say), outer ones first."""
    return [m for m in model.modules() if isinstance(m, PreTrainedModel)]


def refuse_unsupported(model: PreTrainedModel, modules: list[nn.Module]) -> None:
    """Raise ValueError for the first reason why a model's attention would not be computed right."""
    config = model.config.get_text_config(decoder=True)
    layer_types = set(getattr(config, "layer_types", None) or ())
    generation = getattr(model, "generation_config", None)
    cache_kind = getattr(generation, "cache_implementation", None)
    reasons = {
        "it is an encoder-decoder": model.config.is_encoder_decoder,
        "it does not call attention through transformers' interface": not model._can_set_attn_implementation(),
        "it has no attention layers that keysift knows": not modules,
        "it is an encoder": modules and not any(m.is_causal for m in modules),
        "it caps attention scores (softcap)": getattr(config, "attn_logit_softcapping", None) is not None,
        "it has attention sinks as parameters": any(hasattr(m, "sinks") for m in modules),
        "it rearranges cached keys and values": any(type(m).__name__ == "DiffLlamaAttention" for m in modules),
        "it adds position biases (alibi)": getattr(config, "alibi", False),
        "it shares keys between layers": getattr(config, "kv_sharing_modes", None)
        or getattr(config, "num_kv_shared_layers", None),
        f"it has layers of type {', '.join(sorted(layer_types - LAYER_TYPES))}": layer_types - LAYER_TYPES,
        f"its generation config asks for a {cache_kind} cache": cache_kind not in (None, "dynamic"),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"{type(model).__name__} is not supported: {reason}")


LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}


def refuse_arguments(module: nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    for name in ("softcap", "s_aux", "position_bias", "cache"):  # the last comes from continuous batching
        if kwargs.get(name) is not None:
            raise ValueError(f"{type(module).__name__} passes {name}: keysift does not support it")
    if kwargs.get("output_attentions"):
        raise ValueError("keysift computes no attention weights: leave output_attentions out, or use eager attention")
    if dropout:
        raise ValueError("keysift is for inference: call model.eval(), which turns attention dropout off")


def _adopt_cache(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
    if cache is None:
        return
    link: Attachment = module.__dict__["_keysift"]
    ours, offloads = cache.__dict__.get("_keysift"), link.kv_device == "cpu"
    if ours == TAKEN:
        raise ValueError("this cache belongs to HybridSteps: close() them first")
    if ours is None or offloads and ours == "gpu":
        tier = HostTier(link.decode, HostMemory(link.host_memory), link.select_device)
        adopt(cache, tier if offloads else None)


def _noting_prompts(prefill: Any, link: Attachment) -> Callable[..., Any]:
    """``model._prefill``, noting while it runs that the tokens are prompt: a chunk may be a single token.

    An assistant calls it again in every round of drafting; only its first one is a prompt.
    """

    @functools.wraps(prefill)
    def noting(input_ids: Any, generation_config: Any, model_kwargs: Any, *args: Any, **kwargs: Any) -> Any:
        cache = model_kwargs.get("past_key_values")
        link.in_prompt = not generation_config.is_assistant or cache is None or cache.get_seq_length() == 0
        try:
            return prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        finally:
            link.in_prompt = False

    return noting


def _set(holder: Any, name: str, value: Any, undo: list[Callable[[], object]]) -> None:
    """Set an attribute on one object, past nn.Module's bookkeeping, and note how to undo it."""
    before = holder.__dict__.get(name)
    holder.__dict__[name] = value
    undo.append(lambda: holder.__dict__.pop(name) if before is None else holder.__dict__.__setitem__(name, before))
