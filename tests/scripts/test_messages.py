"""What a command prints beside its results."""

import subprocess
import sys

import pytest

from trl_ama.common.errors import sentence


SCRIPT = """
import warnings
from pathlib import Path
import trl_ama
from trl_ama.scripts.messages import tidy_warnings

tidy_warnings("ama-check")
ours = str(Path(trl_ama.__file__).parent / "pipeline/run.py")
warnings.warn_explicit("One of ours,\\n  on two lines.", UserWarning, ours, 3)
warnings.warn_explicit("One of theirs.", UserWarning, "other.py", 3)
for name in ("gradient_checkpointing", "is_gradient_checkpointing", "gradient_checkpointing_enable", "something"):
    warnings.warn_explicit(f"`{name}` is deprecated and will be removed.", FutureWarning, "other.py", 4)
"""


def said(*options: str) -> list[str]:
    done = subprocess.run([sys.executable, *options, "-c", SCRIPT], capture_output=True, text=True, check=True)
    return done.stderr.splitlines()


def test_our_warnings_take_one_line_and_a_default_of_trl_none():
    lines = said()
    assert "trl ama-check: warning: One of ours, on two lines." in lines
    assert "other.py:3: UserWarning: One of theirs." in lines
    assert [line for line in lines if "deprecated" in line] == [
        "other.py:4: FutureWarning: `something` is deprecated and will be removed."
    ]


def test_what_python_is_asked_for_stays():
    assert sum("deprecated" in line for line in said("-W", "always")) == 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no such file", "no such file."),
        ("It is gone.", "It is gone."),
        ("Really?\nmore", "Really?"),
        ("found:\n - a", "found."),
        ("", "OSError."),
    ],
)
def test_another_library_s_message_ends_as_a_sentence(text, expected):
    assert sentence(OSError(text)) == expected
