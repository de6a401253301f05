"""Some hundred cases of the fuzz, of every kind; `python tests/fuzz.py` runs thousands."""

import os

import pytest
from fuzz import KINDS, fuzz


@pytest.mark.skipif(not hasattr(os, "fork"), reason="its cases run in a forked child")
def test_malformed_input_ends_in_one_sentence():
    counts, failures = fuzz(cases=150, start=100_000)  # other cases than those of the whole
    assert not failures, "\n\n".join(failures)
    for kind in KINDS:
        assert counts[kind, "AMAError"] > 5, (kind, counts)  # it was malformed, and that was seen
    assert sum(counts[kind, "success"] for kind in KINDS) > 5  # and not everything is refused
