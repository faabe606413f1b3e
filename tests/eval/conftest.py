"""The shipped model, loaded once."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from keysift import pocket


@pytest.fixture(scope="session")
def pocket_model():
    """Model, fp32, and tokenizer."""
    folder = pocket.path()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        folder
    )
