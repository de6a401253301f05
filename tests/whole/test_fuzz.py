"""Some hundred cases of the fuzz, of every kind; `python tests/support/fuzz.py` runs thousands."""

import json
import os

import pytest
from fuzz import KINDS, main
from ready import Job, leave_with


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="its cases run in a forked child")
def test_malformed_input_ends_in_one_sentence(tmp_path):
    # Not in a fork of this process, which may wait forever for a lock of one of its threads. From 100,000 on: other cases
    # than those of the whole
    ends = tmp_path / "ends.json"
    flags = ["--cases", "150", "--start", "100000", "--json", str(ends)]
    job = Job(leave_with, main, flags, folder=tmp_path, seconds=900)
    code = job.wait()
    assert ends.is_file(), job.stderr[-3000:]
    found = json.loads(ends.read_text())
    assert not found["failures"], "\n\n".join(found["failures"])
    assert code == 0
    for kind in KINDS:
        assert found["counts"][kind]["AMAError"] > 5, (kind, found["counts"])  # it was malformed, and that was seen
    assert sum(ends["success"] for ends in found["counts"].values()) > 5  # and not everything is refused
