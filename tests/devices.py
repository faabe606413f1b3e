"""Where tests of kernels run: on a CUDA device, or, where there is none, in Triton's interpreter."""

from importlib.util import find_spec

import pytest
import torch


def _interpreted() -> bool:
    if find_spec("triton") is None:
        return False
    import triton

    # the interpreter replaces the language when triton is imported, and kernels when they are
    return triton.knobs.runtime.interpret and type(triton.language.max).__name__ == "InterpretedFunction"


CUDA, INTERPRETED = torch.cuda.is_available(), _interpreted()
DEVICE = "cuda" if CUDA else "cpu"
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="no CUDA device on this machine")]
IN_INTERPRETER = pytest.mark.skipif(not INTERPRETED, reason="triton was imported without its interpreter")
DEVICES = [pytest.param("cpu", marks=IN_INTERPRETER), pytest.param("cuda", marks=ON_GPU)]
ANYWHERE = pytest.mark.skipif(not CUDA and not INTERPRETED, reason="triton was imported without its interpreter")
QUIET = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # on masked lanes too
