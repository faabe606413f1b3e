"""Any Hugging Face decoder, behind transformers' own interfaces: no model code of ours."""

from keysift.hf.attach import SHORT_RUN, Attachment, RunStats, attach, detach
from keysift.hf.cache import KVCache
from keysift.hf.hybrid import HybridSteps

__all__ = ["SHORT_RUN", "Attachment", "HybridSteps", "KVCache", "RunStats", "attach", "detach"]
