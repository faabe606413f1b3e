"""The lm-eval model "keysift": ``python -m keysift.eval.lm --model keysift --model_args prefill=SPEC --tasks ...``."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from keysift import pocket
from keysift.eval import squad
from keysift.eval.model_args import glue, glue_pairs, method, prepare, refuse_draft
from keysift.eval.questions import Batch, last_token_as, read_prompt, repeat_cache
from keysift.hf import Attachment, KVCache, RunStats, attach
from keysift.methods import parse
from keysift.requests import check_question
from keysift.types import check_seed

try:
    from lm_eval.api.registry import register_model  # type: ignore[import-untyped]
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped]
    from tqdm import tqdm  # type: ignore[import-untyped]
except ImportError as error:
    needed = f"keysift: evaluation needs lm-eval: pip install 'keysift[eval]' ({error})"
    if __name__ == "__main__":
        sys.stderr.write(f"{needed}\n")
        sys.exit(2)
    raise ImportError(needed) from error

LOGITS_BYTES = 1 << 28  # logits of a long text exist for so many bytes at a time
log = logging.getLogger(__name__)


class Request(NamedTuple):
    """A text to score: how likely its last tokens are after the first ones.

    Attributes:
        place: among the requests of a call.
        context: token ids, at least one, cut from the left to what the model can hold.
        continuation: token ids to score, at least one.
    """

    place: int
    context: tuple[int, ...]
    continuation: tuple[int, ...]


class KeysiftLM(HFLM):
    """lm-eval's Hugging Face model, its prompts read by a prefill method and all that follows by a decode method.

    Args:
        pretrained: model folder or hub id, or a loaded model; "pocket" is the model that keysift ships.
        prefill, decode: SPECs or method objects. In a SPEC, ";" may stand for ",".
        draft: none: drafts change no answer, and are not used here.
        seed: of the methods' random draws.
        question, question_tokens: how the end of each prompt is read, see ``keysift.eval.generate``.
        **kwargs: what lm-eval's own model takes: dtype, device, batch_size, max_length, peft, ...

    Raises:
        ValueError: bad SPECs and arguments, and models that keysift does not support; says which.
    """

    def __init__(
        self,
        pretrained: Any = "pocket",
        *,
        prefill: Any = "dense",
        decode: Any = "dense",
        draft: Any = None,
        seed: int = 0,
        question: str = "sparse",
        question_tokens: int | None = None,
        device: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.methods = {"prefill": method(prefill, "prefill"), "decode": method(decode, "decode")}
        refuse_draft(draft)
        check_seed(seed)
        check_question(question, question_tokens)
        self.seed, self.question, self.question_tokens = seed, question, question_tokens
        self.link: Attachment | None = None
        if pretrained == "pocket":
            pretrained = str(pocket.path())
        super().__init__(pretrained, device=device or ("cuda" if torch.cuda.is_available() else "cpu"), **kwargs)
        if question == "decode":
            self.batch_size_per_gpu = 1  # a prompt shorter than its question has no context to decode after
        with self.attached():
            pass  # refuses, by name, models that cannot be served

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> KeysiftLM:
        return super().create_from_arg_string(glue(arg_string, cls.arguments()), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> KeysiftLM:
        return super().create_from_arg_obj(glue_pairs(arg_dict, cls.arguments()), additional_config)

    @classmethod
    def arguments(cls) -> set[str]:
        """Names that this model and lm-eval's own take."""
        names = (name for kind in (cls, HFLM) for name in inspect.signature(kind.__init__).parameters)
        return {*names} - {"self", "kwargs"}

    @property
    def decoder(self) -> Any:
        """The transformers model itself, out of a wrapper with adapters."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @contextmanager
    def attached(self) -> Iterator[Attachment]:
        """The methods at work in the model, as in every request; outside of requests the model is as it was.

        ``link`` is the newest attachment; its statistics go on from one to the next.
        """
        with attach(self.decoder, **self.methods, seed=self.seed) as link:
            if self.link is not None:
                link.meter = self.link.meter
            self.link = link
            yield link

    @property
    def stats(self) -> RunStats:
        """What all requests since ``reset_stats`` have read."""
        assert self.link is not None
        return self.link.stats

    def reset_stats(self, measure_error: bool = False) -> None:
        assert self.link is not None
        self.link.reset_stats(measure_error)

    # ---- what lm-eval calls ----

    def _get_backend(self, config: Any, backend: Any = "default", trust_remote_code: bool | None = False) -> None:
        super()._get_backend(config, backend, trust_remote_code)
        if self.backend != "causal":
            raise ValueError(f"{config.model_type} is an encoder-decoder: keysift serves decoders only")

    def _create_model(self, *args: Any, **kwargs: Any) -> None:
        super()._create_model(*args, **kwargs)
        adapter = getattr(self._model, "active_peft_config", None)
        if getattr(adapter, "is_prompt_learning", False):
            raise ValueError("peft: adapters that add virtual tokens are not supported: use LoRA or merge the adapter")

    def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Tensor:
        """Logits of the last token, ``[B, 1, V]``: lm-eval's search for a batch size must not make all the others."""
        with self.attached(), torch.no_grad(), self._autocast():
            return self.decoder(input_ids=inps, use_cache=False, logits_to_keep=1).logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
        with self.attached() as link:
            if self.question == "sparse":
                return super()._model_generate(context, max_length, stop, **kwargs)
            mask = kwargs["attention_mask"]
            with self._autocast():
                _, cache = read_prompt(self.decoder, link, context, mask, self.question, self.question_tokens, leave=1)
            repeat_cache(cache, self.decoder, kwargs)
            with last_token_as(link, self.question):
                return super()._model_generate(context, max_length, stop, past_key_values=cache, **kwargs)

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Sum of log-probabilities of each request's continuation, and whether greedy decoding would write it."""
        cut = [cut_left(i, text, prior, rest, self.max_length) for i, (text, prior, rest) in enumerate(requests)]
        answers: list[Any] = [None] * len(cut)
        if not cut:
            return answers
        whole_texts = requests[0][0] is None  # of loglikelihood_rolling: their strings are not known here
        score = self._score_texts if whole_texts else self._score_continuations
        off = disable_tqdm or self.rank != 0 or whole_texts  # which come a batch at a time
        with (
            tqdm(total=len(cut), disable=off, desc="Running loglikelihood requests") as bar,
            self.attached() as link,
            torch.no_grad(),
            self._autocast(),
        ):
            for request, answer in score(link, cut, self._rows(cut, override_bs)):
                answers[request.place] = answer
                if (strings := requests[request.place][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", strings, answer)
                bar.update()
        return answers

    # ---- scoring ----

    def _score_continuations(
        self, link: Attachment, requests: list[Request], rows: int
    ) -> Iterator[tuple[Request, tuple[float, bool]]]:
        """Contexts as prompts, each once; then their continuations after them, one of each context at a time."""
        by_context: dict[tuple[int, ...], list[Request]] = {}
        for request in sorted(requests, key=lambda r: -len(r.continuation)):
            by_context.setdefault(request.context, []).append(request)
        contexts = sorted(by_context, key=lambda context: (-len(context), context))
        for start in range(0, len(contexts), rows):
            group = contexts[start : start + rows]
            yield from self._score_group(link, group, [by_context[context] for context in group])

    def _score_group(
        self, link: Attachment, contexts: list[tuple[int, ...]], waiting: list[list[Request]]
    ) -> Iterator[tuple[Request, tuple[float, bool]]]:
        """The continuations ``waiting[b]`` of each ``contexts[b]``, longest first."""
        prompt, logits, cache = self._read(link, contexts)
        row = [b for b, queue in enumerate(waiting) for _ in queue]
        flat = [request for queue in waiting for request in queue]
        first, hit = self._picked(logits[row], torch.tensor([r.continuation[0] for r in flat], device=logits.device))
        begun = {r.place: (float(x), bool(y)) for r, x, y in zip(flat, first.tolist(), hit.tolist(), strict=True)}
        yield from ((r, begun[r.place]) for r in flat if len(r.continuation) == 1)

        queues = [[r for r in queue if len(r.continuation) > 1] for queue in waiting]
        held = list(range(len(contexts)))  # the context in each row of the cache
        fresh = True
        for turn in range(max(map(len, queues))):
            active = [b for b in held if turn < len(queues[b])]
            if not fresh and _cannot_crop(cache):
                prompt, _, cache = self._read(link, [contexts[b] for b in active])
            else:
                if not fresh:
                    cache.crop(prompt.ids.shape[1] - cache.get_seq_length())
                if active != held:
                    keep = torch.tensor([held.index(b) for b in active], device=prompt.ids.device)
                    cache.batch_select_indices(keep)
                    prompt = Batch(prompt.ids[keep], prompt.mask[keep])
            held, fresh = active, False
            now = [queues[b][turn] for b in held]
            for request, (total, greedy) in zip(now, self._follow(link, prompt, cache, now), strict=True):
                begin, was_greedy = begun[request.place]
                yield request, (begin + total, was_greedy and greedy)

    def _read(self, link: Attachment, contexts: list[tuple[int, ...]]) -> tuple[Batch, Tensor, KVCache]:
        """The contexts as prompts; logits ``[B, V]`` of what comes next, and the cache."""
        prompt = Batch.of(contexts, self.device)
        logits, cache = read_prompt(self.decoder, link, prompt.ids, prompt.mask, self.question, self.question_tokens)
        assert logits is not None
        return prompt, logits, cache

    def _follow(
        self, link: Attachment, prompt: Batch, cache: KVCache, requests: list[Request]
    ) -> list[tuple[float, bool]]:
        """Score all but the first token of one continuation per row of the cache, as the decode method would read it.

        Rows that end early go on with their last token, which changes nothing before it.
        """
        steps = max(len(r.continuation) for r in requests) - 1
        tokens = [r.continuation + r.continuation[-1:] * (steps + 1 - len(r.continuation)) for r in requests]
        whole = torch.tensor(tokens, device=prompt.ids.device)
        batch, past = prompt.then(whole[:, :-1]), prompt.ids.shape[1]
        dense = self.methods["decode"] == parse("dense", "decode")
        size = self._columns(len(requests)) if dense else 1
        scores, hits = [], []
        for i in range(0, steps, size):
            piece = slice(past + i, min(past + i + size, past + steps))
            with link.reading("decode"):
                logits = self.decoder(
                    input_ids=batch.ids[:, piece],
                    attention_mask=batch.mask[:, : piece.stop],
                    position_ids=batch.positions[:, piece],
                    past_key_values=cache,
                    use_cache=True,
                ).logits
            score, hit = self._picked(logits, whole[:, i + 1 : i + 1 + size])
            scores.append(score.double().cpu())
            hits.append(hit.cpu())
        score, hit = torch.cat(scores, 1), torch.cat(hits, 1)
        counts = [len(r.continuation) - 1 for r in requests]
        return [(float(score[b, :n].sum()), bool(hit[b, :n].all())) for b, n in enumerate(counts)]

    def _score_texts(
        self, link: Attachment, requests: list[Request], rows: int
    ) -> Iterator[tuple[Request, tuple[float, bool]]]:
        """Whole texts as prompts: every token is scored from what the prefill method reads."""
        ordered = sorted(requests, key=lambda r: -len(r.context) - len(r.continuation))
        for start in range(0, len(ordered), rows):
            group = ordered[start : start + rows]
            texts = Batch.of([r.context + r.continuation for r in group], self.device)
            prompt = Batch(texts.ids[:, :-1], texts.mask[:, :-1])
            width, counts = prompt.ids.shape[1], [len(r.continuation) for r in group]
            with link.reading("sparse"):
                hidden = hidden_states(self.decoder, prompt)
            scores, hits = [], []
            begin, size = width - max(counts), self._columns(len(group))
            for i in range(begin, width, size):
                score, hit = self._picked(
                    head(self.decoder, hidden, slice(i, i + size)), texts.ids[:, i + 1 : i + 1 + size]
                )
                scores.append(score.double().cpu())
                hits.append(hit.cpu())
            score, hit = torch.cat(scores, 1), torch.cat(hits, 1)
            for b, (request, n) in enumerate(zip(group, counts, strict=True)):
                yield request, (float(score[b, -n:].sum()), bool(hit[b, -n:].all()))

    def _picked(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of each target, and whether it is the likeliest; logits ``[..., V]``."""
        logits, targets = logits.to(self.softmax_dtype or torch.float32), targets.to(logits.device)
        chosen = logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)
        return chosen, logits.argmax(-1) == targets

    def _columns(self, rows: int) -> int:
        """How many tokens of ``rows`` sequences may have logits at a time."""
        vocabulary = self.decoder.get_output_embeddings().weight.shape[0]
        return max(1, LOGITS_BYTES // (4 * rows * vocabulary))

    def _rows(self, requests: list[Request], override: int | None) -> int:
        """Sequences in a batch; with batch_size=auto the longest request decides."""
        if self.batch_size != "auto":
            return int(self.batch_size)
        if override is None:
            longest = max(requests, key=lambda r: len(r.context) + len(r.continuation))
            override = self._detect_batch_size([(None, list(longest.context), list(longest.continuation))], 0)
            self.batch_sizes = {0: override}
        return override

    def _autocast(self) -> Any:
        dtype = self.mixed_precision_dtype
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)


if __name__ != "__main__":
    register_model("keysift")(KeysiftLM)


def cut_left(place: int, strings: Any, context: Sequence[int], continuation: Sequence[int], max_length: int) -> Request:
    """A request whose model input, all tokens but the last, is at most ``max_length`` long."""
    if not continuation or len(continuation) > max_length:
        raise ValueError(
            f"a continuation of {len(continuation)} tokens cannot be scored: it needs 1 to max_length={max_length}"
            + (f", in {strings!r:.200}" if strings else "")
        )
    whole = (*context, *continuation)
    if len(whole) > max_length + 1:
        log.warning("a request of %d tokens is cut from the left to max_length=%d", len(whole) - 1, max_length)
    return Request(place, whole[-(max_length + 1) : -len(continuation)], tuple(continuation))


def hidden_states(model: Any, prompt: Batch) -> Any:
    """The decoder's output for a prompt, ``[B, T, hidden]`` in ``last_hidden_state``, caught on its way to the head."""
    caught: list[Any] = []
    hook = model.get_decoder().register_forward_hook(lambda module, args, output: caught.append(output))
    try:
        model(
            input_ids=prompt.ids,
            attention_mask=prompt.mask,
            position_ids=prompt.positions,
            use_cache=False,
            logits_to_keep=1,
        )
    finally:
        hook.remove()
    return caught[0]


def head(model: Any, output: Any, columns: slice) -> Tensor:
    """Logits ``[B, columns, V]`` from a decoder's output: the model's own head, whatever it does to them."""
    decoder: nn.Module = model.get_decoder()
    states = output.last_hidden_state[:, columns]
    part = type(output)(last_hidden_state=states)
    before = decoder.__dict__.get("forward")
    decoder.__dict__["forward"] = lambda *args, **kwargs: part
    try:
        ids = torch.zeros(states.shape[:2], dtype=torch.int64, device=states.device)
        return model(input_ids=ids, use_cache=False).logits
    finally:
        del decoder.__dict__["forward"]
        if before is not None:
            decoder.__dict__["forward"] = before


def _cannot_crop(cache: KVCache) -> bool:
    """A window's layers have forgotten what a crop would have to bring back."""
    return any(getattr(layer, "is_sliding", False) for layer in cache.layers)


# ---- the command line ----


def main(args: Sequence[str] | None = None) -> int:
    """lm-eval's command line with the model "keysift"; an error is one line and exit code 2."""
    from lm_eval.__main__ import cli_evaluate  # type: ignore[import-untyped]

    squad.provide()
    before = sys.argv
    sys.argv = ["keysift.eval.lm", *prepare(before[1:] if args is None else args, KeysiftLM.arguments())]
    try:
        cli_evaluate()
    except (ValueError, OSError, ImportError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        sys.stderr.write(f"keysift: {' '.join(str(error).split())}\n")
        return 2
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        sys.stderr.write(f"keysift: --model_args: {error}\n")
        return 2
    finally:
        sys.argv = before
    return 0


if __name__ == "__main__":
    from keysift.eval import lm

    sys.exit(lm.main())
