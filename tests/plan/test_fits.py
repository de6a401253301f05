"""Which card a plan recommends: what is not ours is left free."""

import pytest

from trl_ama.plan.memory import GIB, StageMemory
from trl_ama.plan.text import fits


@pytest.mark.parametrize(
    "peak, card",
    [
        (6.7, "8 GB"),
        (6.8, "12 GB"),
        (10.5, "12 GB"),
        (20.3, "24 GB"),
        (20.4, "48 GB"),
        (41.2, "80 GB"),
        (73.3, "over 80 GB"),
    ],
)
def test_a_gib_or_eight_hundredths_are_left_free(peak, card):
    memory = StageMemory(
        **dict.fromkeys(("parameters", "trainable", "saved", "weights", "reference", "gradients", "optimizer"), 0),
        activations=0,
        peak=int(peak * GIB),
        paged=False,
        packed=False,
        pairs=[(12, 8, 6)],
        common=0,
    )
    assert fits(memory).removesuffix(" and up") == card
