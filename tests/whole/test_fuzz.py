"""Some hundred cases of the fuzz, of every kind; `python tests/support/fuzz.py` runs thousands."""

import json
import os
import subprocess
import sys

import pytest
from fuzz import KINDS
from places import SUPPORT


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="its cases run in a forked child")
def test_malformed_input_ends_in_one_sentence(tmp_path):
    # In a process of its own, as a fork of this one may wait forever for a lock of one of its threads. From 100,000 on:
    # other cases than those of the whole
    command = [sys.executable, str(SUPPORT / "fuzz.py"), "--cases", "150", "--start", "100000"]
    done = subprocess.run([*command, "--json", "ends.json"], cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert (tmp_path / "ends.json").is_file(), done.stderr[-3000:]
    found = json.loads((tmp_path / "ends.json").read_text())
    assert not found["failures"], "\n\n".join(found["failures"])
    assert done.returncode == 0
    for kind in KINDS:
        assert found["counts"][kind]["AMAError"] > 5, (kind, found["counts"])  # it was malformed, and that was seen
    assert sum(ends["success"] for ends in found["counts"].values()) > 5  # and not everything is refused
