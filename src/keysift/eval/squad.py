"""Exact match and F1 of short answers (SQuAD, arXiv:1606.05250), under the name that lm-eval imports them by.

transformers 5 no longer has ``transformers.data.metrics.squad_metrics``, which lm-eval's coqa, xquad, record and others
ask for when they are loaded.
"""

from __future__ import annotations

import importlib.util
import re
import string
import sys
import types
from collections import Counter

PARENT = "transformers.data.metrics"
ARTICLES = re.compile(r"\b(?:a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def provide() -> None:
    """Make the module importable where transformers has none."""
    if PARENT in sys.modules or importlib.util.find_spec(PARENT) is not None:
        return
    parent, module = types.ModuleType(PARENT), types.ModuleType(f"{PARENT}.squad_metrics")
    module.__dict__.update({f.__name__: f for f in (normalize_answer, get_tokens, compute_exact, compute_f1)})
    parent.__dict__["squad_metrics"] = module
    sys.modules |= {PARENT: parent, f"{PARENT}.squad_metrics": module}


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and spare spaces."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split())


def get_tokens(text: str) -> list[str]:
    return normalize_answer(text).split() if text else []


def compute_exact(gold: str, pred: str) -> int:
    """1 if both say the same, else 0."""
    return int(normalize_answer(gold) == normalize_answer(pred))


def compute_f1(gold: str, pred: str) -> float:
    """Harmonic mean of the shares of words in common; two empty answers agree."""
    wanted, said = get_tokens(gold), get_tokens(pred)
    if not wanted or not said:
        return float(wanted == said)
    return 2 * sum((Counter(wanted) & Counter(said)).values()) / (len(wanted) + len(said))
