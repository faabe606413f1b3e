"""The pocket model: a 6.4M-parameter Qwen3 checkpoint that retrieves from up to 32K tokens.

It ships with the package, so that every command runs on real input anywhere.
The model card is README.md in this folder; `tools/train_pocket.py` trains it.
"""

from pathlib import Path

__all__ = ["NAME", "path"]

NAME = "pocket"  # where commands take a model


def path() -> Path:
    """Folder of the checkpoint, for `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`."""
    return Path(__file__).resolve().parent
