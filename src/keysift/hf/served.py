"""A model over slots: prompts are read into them, and a decode step of all of them is one CUDA graph.

Its attention is an operation that the compiler does not look into, so each decoder layer is compiled whole, once for
all layers alike. A step always computes all slots, in use or not: a matrix product of one shape gives a row the same
bits whatever the other rows are, so that an answer does not depend on what else is in the batch.
"""

from __future__ import annotations

import itertools
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from keysift import attention as path
from keysift.cache import Store
from keysift.hf.attach import Mask, attention_modules, mask_function, refuse_arguments, refuse_unsupported
from keysift.hf.beside import decoder_layers, join_layers, part_layers
from keysift.hf.config import rope_types
from keysift.hf.paged import captured
from keysift.hf.parallel import first_head, is_dealt_out, least
from keysift.hf.slots_cache import SlotsCache
from keysift.meter import Meter, StepMeter
from keysift.methods import dense
from keysift.ops.dense import dense_attention
from keysift.slots import Slots
from keysift.types import KV, Ctx, Decode, Prefill

NAME = "keysift-slots"
NO_WINDOW = 0
OF_LONGEST = {"dynamic", "longrope"}  # whose frequencies depend on the longest sequence of a batch
DENSE = dense.Method()
log = logging.getLogger(__name__)
Attention = Callable[[int, Tensor, Tensor, Tensor, int | None, float], Tensor]

_served: weakref.WeakValueDictionary[int, ServedModel] = weakref.WeakValueDictionary()
_numbers = itertools.count()


class Shape(NamedTuple):
    """Of a layer's keys and values: KV heads, head dims and dtype."""

    kv_heads: int
    dim: int
    v_dim: int
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Of a token's key and value."""
        return self.kv_heads * (self.dim + self.v_dim) * self.dtype.itemsize


class Reading(NamedTuple):
    """A part of a prompt that is being read.

    Attributes:
        slot: where to.
        first: whether nothing was read before it.
        last: whether nothing will be read after it.
        meter: counts what is read.
        dense: whether it is read by dense attention, and not by the prefill method.
    """

    slot: int
    first: bool
    last: bool
    meter: Meter
    dense: bool


class ServedModel:
    """A model whose attention goes through slots until ``close``.

    Attributes:
        shapes: of the layers' keys and values, as the model makes them.
        chooses: whether any layer is left to the methods, none having a window of its own.
        ids: newest token of each slot, which the next step reads, int64 ``[slots, 1]``.
        logits: of the token after it, as the last step found them, fp32 ``[slots, vocabulary]``.
        meter: counts what metered steps read.
        active: slots that take part in steps.
        plain_steps: how many steps there were.
        vocabulary: tokens that logits are of.
        graphed: whether a step is the replay of a graph; None before the first one.
        compiled: whether layers are compiled; None before the first step.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prefill: Prefill,
        decode: Decode,
        seed: int = 0,
        compile_layers: bool = True,
        shared: int | None = None,
        measure_error: bool = False,
        draft: Decode | None = None,
    ) -> None:
        """Take over a model's attention, until ``close``; ``open`` comes before anything is read.

        Args:
            prefill, decode: methods.
            seed: of their draws.
            compile_layers: on a GPU, have decode steps compiled; without, they are slower and round as the model's
                own code does.
            shared: rows with which prompts that share pages begin alike; None if they share none.
            measure_error: also compute dense attention, in steps that are metered.
            draft: method that drafts in ``Rounds``, for which side data are kept then.

        Raises:
            ValueError: a model that cannot be served correctly; says why.
        """
        modules = attention_modules(model)
        refuse_unsupported(model, modules)
        if any("_keysift_where" in module.__dict__ for module in modules):
            raise ValueError(f"this {type(model).__name__} is served already: close that LLM first")
        if "_keysift" in model.__dict__:
            raise ValueError(f"this {type(model).__name__} is attached: call keysift.detach(model) first")
        self.model, self.seed, self.shared, self.measure_error = model, seed, shared, measure_error
        self.prefill_method, self.decode_method, self.draft_method = prefill, decode, draft
        self._attention: Attention | None = None  # instead of a decode step's
        self.cache = SlotsCache(model.config.get_text_config(decoder=True).num_hidden_layers)
        self._layers = decoder_layers(model) if compile_layers and model.device.type == "cuda" else []
        self._number = next(_numbers)
        _served[self._number] = self
        for module in modules:
            layer = int(module.layer_idx)  # type: ignore[arg-type]
            module.__dict__["_keysift_where"] = torch.tensor([self._number, layer])
        self._give_back = weakref.finalize(self, _restore, model, modules, model.config._attn_implementation)
        model.set_attn_implementation(NAME)
        self._probed: dict[int, Shape] | None = {}
        self.chooses = False
        try:
            self._probe(modules)
        except BaseException:
            self.close()
            raise

    def _probe(self, modules: list[nn.Module]) -> None:
        """Have one token computed, to see what shapes keys and values have: configs do not always say."""
        one = torch.zeros(1, 1, dtype=torch.int64, device=self.model.device)
        with torch.no_grad():
            out = self.model(input_ids=one, position_ids=one, past_key_values=self.cache, use_cache=True)
        self.vocabulary = out.logits.shape[-1]
        assert self._probed is not None
        self.shapes = [shape for _, shape in sorted(self._probed.items())]
        layers = sorted(modules, key=lambda module: int(module.layer_idx))  # type: ignore[arg-type]
        self._ctx = [
            Ctx(layer, 0.0, one, self.seed, first_head=first_head(module, self.shapes[layer].kv_heads))
            for layer, module in enumerate(layers)
        ]
        self._probed = None
        if self._layers:
            join_layers(self.model)

    def open(self, slots: Slots, rounds: bool = False) -> None:
        """Have keys and values of all sequences go to ``slots``, ``slots.capacity`` rows at most each; ``rounds`` says
        that passes over drafted tokens come, too."""
        if len(slots) > 1 and (kinds := rope_types(self.model) & OF_LONGEST):
            raise ValueError(
                f"the RoPE of this {type(self.model).__name__} ({kinds.pop()}) depends on the longest sequence of a"
                " batch: one sequence at a time then, max_batch=1 or --batch 1"
            )
        if rounds and (kinds := rope_types(self.model) & OF_LONGEST):
            raise ValueError(
                f"the RoPE of this {type(self.model).__name__} ({kinds.pop()}) depends on the longest position of a"
                " pass, drafted tokens included: leave draft out"
            )
        device, self.slots = slots.device, slots
        self._graphs: dict[Any, torch.cuda.CUDAGraph] = {}
        self._tried: set[Any] = set()  # names of graphs
        self.stores = [Store.in_pages(slots, *shape) for shape in self.shapes]
        self.ids = torch.zeros(len(slots), 1, dtype=torch.int64, device=device)
        self.logits = torch.zeros(len(slots), self.vocabulary, device=device)
        self.graphed: bool | None = None
        self.compiled: bool | None = None
        self._one = torch.ones(len(slots), dtype=torch.int64, device=device)
        self._idle = torch.ones_like(self._one)  # 1 where a slot takes no part in steps
        self.meter = StepMeter(self._idle, self.measure_error)
        self.active: set[int] = set()
        self._reading: Reading | None = None
        self._metering = False
        self.plain_steps = 0
        self._tails: dict[int, Tensor] = {}  # last queries of the prompt that is being read, by layer

    def let_go(self) -> None:
        """Give back the memory of keys and values; ``open`` makes anew."""
        if hasattr(self, "slots"):
            self._graphs.clear()
            self.stores.clear()
            self.slots.stores.clear()

    def close(self) -> None:
        """Give the model its own attention back, and the memory of keys and values."""
        self.let_go()
        self._give_back()

    # ---- prompts ----------------------------------------------------------------------------------------------------

    def read(self, slot: int, token_ids: Sequence[int], meter: Meter, last: bool = True, dense: bool = False) -> Tensor:
        """Read a part of a prompt into a slot, whose rows are reserved.

        Args:
            slot: that the parts before it are in, or begun with pages that hold them.
            token_ids: the part.
            meter: counts what is read of its keys.
            last: whether the prompt ends with it.
            dense: by dense attention, whatever the prefill method is.

        Returns:
            Logits after its last token, fp32 ``[vocabulary]``.
        """
        slots, start, tokens = self.slots, self.slots.lengths[slot], len(token_ids)
        if start == 0 or self._reading is None or self._reading.slot != slot:
            self._tails.clear()
        counts = [0] * len(slots)
        counts[slot] = tokens
        slots.append(counts)
        if last:
            slots.end_prompt(slot)
        self._reading = Reading(slot, start == 0, last, meter, dense)
        device = slots.device
        try:
            with torch.no_grad():
                out = self.model(
                    input_ids=torch.tensor([token_ids], device=device),
                    position_ids=torch.arange(start, start + tokens, device=device)[None],
                    past_key_values=self.cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
        except BaseException:
            slots.truncate(slot, start)
            raise
        if last:
            self._reading = None
        return out.logits[0, -1].float()

    def _read(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
        """Attention of a part of a prompt, and what the decode method keeps of it."""
        slot, first, last, meter, dense = self._now_reading()
        store, which = self.stores[layer], slice(slot, slot + 1)
        store.write(k, v, which)
        kv = KV.of(k, v) if first else store.view(which)
        ctx = self._ctx[layer]._replace(scale=scale, positions=kv.length - 1)
        method = DENSE if dense or window is not None else self.prefill_method
        out = path.prefill(q, kv, method, ctx, meter if window is None else Meter(), window=window)[0]
        keeper = self.keeps_for
        if window is None and keeper != DENSE and layer not in keeper.dense_layers:
            tail = keeper.tail
            newest = torch.cat([self._tails[layer], q], 1) if layer in self._tails else q
            newest = newest[:, max(0, newest.shape[1] - tail) :]
            if last:
                store.begin(keeper, newest, ctx._replace(shared=self.shared), which)
            else:
                self._tails[layer] = newest.clone()
                store.wait(which)
        return out

    def newest_queries(self, layer: int) -> Tensor:
        """Of a prompt that goes on, so many as the decode method wants to see, ``[1, T, H, D]``."""
        return self._tails[layer]

    def _now_reading(self) -> Reading:
        assert self._reading is not None
        return self._reading

    # ---- steps ------------------------------------------------------------------------------------------------------

    def activate(self, slot: int, token: int | Tensor) -> None:
        """Have steps go on with a slot, from ``token`` on."""
        self.ids[slot] = token
        self.active.add(slot)
        self._idle[slot] = 0

    def deactivate(self, slot: int) -> None:
        """Leave a slot out of further steps."""
        self.active.discard(slot)
        self._idle[slot] = 1

    def step(self, metered: bool = False) -> None:
        """One more token of the active slots: ``ids`` becomes the likeliest ones, ``logits`` what they were of.

        What is read sparsely is decided as for sequences of ``slots.capacity`` rows, however long they are: that must
        not depend on others, and cannot in a graph.

        Each active slot must have a row reserved. With ``metered`` what is read is counted, which on a GPU takes a
        graph of its own and a little longer.
        """
        self.run(("step", metered), self._step, metered)
        self.slots.note([int(slot in self.active) for slot in range(len(self.slots))])
        self.plain_steps += 1

    def run(self, name: Any, body: Callable[[], None], metered: bool = False) -> None:
        """Have decode steps computed; on a GPU by replaying a graph, which is captured when its name is new."""
        reading, self._reading, self._metering = self._reading, None, metered
        try:
            with on_device(self.slots.device):
                self._make_ready(name, body)
                graph = self._graphs.get(name)
                graph.replay() if graph is not None else body()
        except BaseException:
            self.slots.take_back()  # of idle slots too
            raise
        finally:
            self._reading, self._metering = reading, False

    def warm_up(self, metered: bool) -> None:
        """Compile and capture a step before any is needed; the slots must be empty."""
        self._metering = metered
        try:
            with on_device(self.slots.device):
                self._make_ready(("step", metered), self._step)
        finally:
            self._metering = False

    @property
    def metering(self) -> StepMeter | None:
        """What counts the step at hand."""
        return self.meter if self._metering else None

    @property
    def keeps_for(self) -> Decode:
        """The method for which side data are kept."""
        return self.decode_method if self.draft_method is None else self.draft_method

    def ready(self, name: Any) -> bool:
        """Whether what ``run`` does under a name needs no preparation any more."""
        return self.slots.device.type != "cuda" or name in self._tried

    def ctx(self, layer: int, scale: float) -> Ctx:
        """Of a decode step."""
        return self._ctx[layer]._replace(scale=scale, positions=self.slots.positions)

    def _step(self) -> None:
        slots = self.slots
        with slots.unknown_lengths(slots.capacity), self.compiled_layers():
            slots.append(self._one)
            self.logits.copy_(self.forward(self.ids, self._decode)[:, -1])
            self.ids.copy_(self.logits.argmax(-1, keepdim=True))
            slots.length -= self._idle

    def forward(self, ids: Tensor, attention: Attention) -> Tensor:
        """Logits of the newest tokens ``ids``, ``[slots, T]``, whose rows the slots have counted; ``[slots, T, V]``."""
        tokens = ids.shape[1]
        position = self.slots.length[:, None] - tokens + torch.arange(tokens, device=ids.device)
        return self.computed(ids, position.clamp(min=0), attention)

    def computed(self, ids: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """Logits of tokens ``[B, T]`` at positions, with an attention that may do without the slots."""
        self._attention = attention
        try:
            with torch.no_grad():
                out = self.model(input_ids=ids, position_ids=positions, past_key_values=self.cache, use_cache=True)
        finally:
            self._attention = None
        return out.logits

    def over_all_keys(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
        """Attention of a few new tokens, each over all keys up to its own."""
        self.stores[layer].write(k, v)
        return path.short(q, self.stores[layer], scale, window)

    def _decode(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
        """Attention of a decode step."""
        store = self.stores[layer]
        store.write(k, v)
        if window is not None:
            return dense_attention(q, store.view(), scale, window)
        return path.decode(q[:, 0], store, self.decode_method, self.ctx(layer, scale), self.metering)[0][:, None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
        """Attention of what the model computes now, ``[B, T, H, D]``; k and v are the new rows."""
        if self._probed is not None:
            self.chooses = self.chooses or window is None
            self._probed[layer] = Shape(k.shape[2], k.shape[3], v.shape[3], k.dtype)
            return v.new_zeros(*q.shape[:3], v.shape[3])
        attention = self._attention or self._read
        return attention(layer, q, k, v, window, scale)

    # ---- compilation and graphs -------------------------------------------------------------------------------------

    def _make_ready(self, name: Any, body: Callable[[], None]) -> None:
        """On a GPU compile layers and capture what ``body`` does, each once; what cannot be is left as it is, with a
        line in the log."""
        if self.slots.device.type != "cuda" or name in self._tried or self.graphed is False:
            return
        with self._nothing_said():
            self.prepare(body)
            worked = self._try("capture", lambda: self._capture(name, body))
        self._tried.add(name)  # not where an interrupt has ended it
        if not worked:
            self._graphs.pop(name, None)
        self.graphed = worked if self.graphed is None else self.graphed

    def prepare(self, body: Callable[[], None]) -> None:
        """Compile layers by having ``body`` computed, if that was not done yet."""
        if self.compiled is None:
            self.compiled = bool(self._layers) and self._try("compile", partial(self._compile, body))
            if not self.compiled:
                self._layers = []

    @contextmanager
    def _nothing_said(self) -> Iterator[None]:
        """Steps within, which prepare others, leave what steps say as it was."""
        kept = [(x, x.clone()) for x in (self.ids, self.logits, self.meter.sums)]
        try:
            yield
        finally:
            for x, before in kept:
                x.copy_(before)

    def _try(self, what: str, do: Callable[[], None]) -> bool:
        try:
            do()
            worked = True
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reason, worked = " ".join(str(error).split())[:200], False
            model = type(self.model).__name__
            log.warning("%s: cannot %s a decode step, which will be slower: %s", model, what, reason)
        if is_dealt_out(self.model):  # all processes have to do the same
            worked = least(int(worked)) == 1
        if not worked:
            self.slots.take_back()
        return worked

    def _compile(self, body: Callable[[], None]) -> None:
        """Compile one layer; the others alike share its code. A lone sequence's products are sums over rows of weights,
        which compiled code does faster than a matrix product, if its tiles are well chosen."""
        lone = len(self.slots) == 1
        tuning = {"coordinate_descent_tuning": lone, "max_autotune_pointwise": lone}
        # with rounding where the model's own code rounds, fused or not
        options = {**tuning, "triton.cudagraphs": False, "emulate_precision_casts": True}
        for layer in self._layers:
            if "_keysift_compiled" in layer.__dict__:
                continue
            layer.compile(fullgraph=True, dynamic=False, options=options)
            layer.__dict__["_keysift_compiled"] = layer._compiled_call_impl
            layer._compiled_call_impl = None
        body()
        self.slots.take_back()

    @contextmanager
    def compiled_layers(self) -> Iterator[None]:
        """Layers are compiled within it: prompts, of any length, are read by the model's own code."""
        config = torch._dynamo.config
        with config.patch(allow_unspec_int_on_nn_module=True, recompile_limit=64):
            for layer in self._layers:
                layer._compiled_call_impl = layer.__dict__.get("_keysift_compiled")
            try:
                yield
            finally:
                for layer in self._layers:
                    layer._compiled_call_impl = None

    def _capture(self, name: Any, body: Callable[[], None]) -> None:
        self._graphs[name] = captured(body, self.slots, beside=next(iter(self._graphs.values()), None))


def _restore(model: PreTrainedModel, modules: list[nn.Module], implementation: str) -> None:
    """A model as it was before it was served."""
    for layer in decoder_layers(model):
        layer._compiled_call_impl = None
        layer.__dict__.pop("_keysift_compiled", None)
    part_layers(model)
    for module in modules:
        module.__dict__.pop("_keysift_where", None)
    model.set_attn_implementation(implementation)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Streams and graphs made within are the device's."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@torch.library.custom_op("keysift::slots_attention", mutates_args=())
def slots_attention(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, where: Tensor, window: int, scale: float) -> Tensor:
    """Attention of a layer over slots; ``where`` is the number of the served model and the layer, on the CPU."""
    number, layer = where.tolist()
    served = _served[number]
    q, k, v = (x.transpose(1, 2) for x in (q_BHTD, k_BKTD, v_BKTD))
    return served.attend(layer, q, k, v, window or None, scale).contiguous()


@slots_attention.register_fake
def _(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, where: Tensor, window: int, scale: float) -> Tensor:
    batch, heads, tokens, _ = q_BHTD.shape
    return q_BHTD.new_empty(batch, tokens, heads, v_BKTD.shape[-1])


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query ``[B, H, T, D]``, new keys and values ``[B, K, T, *]``."""
    refuse_arguments(module, dropout, kwargs)
    if not isinstance(attention_mask, Mask):
        raise ValueError(f"{type(module).__name__} has a mask of its own: keysift cannot serve it over slots")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    where = module._keysift_where
    return torch.ops.keysift.slots_attention(query, key, value, where, attention_mask.window or NO_WINDOW, scale), None


AttentionInterface.register(NAME, attention_function)
AttentionMaskInterface.register(NAME, mask_function)
