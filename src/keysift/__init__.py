"""Long-context LLM inference that reads fewer keys: sparse attention for any Hugging Face decoder."""

from keysift.custom_generate import self_speculate
from keysift.engine import LLM
from keysift.functional import decode_attention, flex_prefill_attention, prefill_attention, prefill_attention_varlen
from keysift.hf import Attachment, KVCache, attach, detach
from keysift.patch import patch_model
from keysift.requests import RequestOutput
from keysift.sampling import SamplingParams
from keysift.types import Stats

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "Attachment",
    "KVCache",
    "RequestOutput",
    "SamplingParams",
    "Stats",
    "attach",
    "decode_attention",
    "detach",
    "flex_prefill_attention",
    "patch_model",
    "prefill_attention",
    "prefill_attention_varlen",
    "self_speculate",
]
