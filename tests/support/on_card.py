"""The card that tests marked `gpu` run on, and why there is none.

python -m pytest -m gpu tests/gpu                     # on the first card
TRL_AMA_CARD=cpu python -m pytest -m gpu tests/gpu    # a rehearsal, which `make gpu GPU_ARGS=--rehearse` does too
"""

import os

import pytest
import torch


REHEARSED = os.environ.get("TRL_AMA_CARD") == "cpu"
CARD = "cuda" if torch.cuda.is_available() and not REHEARSED else "cpu"


def _missing() -> str:
    if REHEARSED or torch.cuda.device_count() == 1:
        return ""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    return "several cards are in sight, over which one process would split its batches: set CUDA_VISIBLE_DEVICES=0"


needs_card = [pytest.mark.gpu, pytest.mark.skipif(bool(_missing()), reason=_missing())]
only_on_a_card = pytest.mark.skipif(REHEARSED, reason="a CPU has no fp16 training")
