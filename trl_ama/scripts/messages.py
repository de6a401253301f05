"""What a command prints beside its results: our own warnings in one line, and none that its user can do nothing about."""

import sys
import warnings
from pathlib import Path


_OURS = str(Path(__file__).resolve().parent.parent)
_format = warnings.formatwarning


def tidy_warnings(command: str) -> None:
    """Print our own warnings as `trl <command>: warning: …`, and leave out one that no recipe causes.

    What `-W` or `PYTHONWARNINGS` asks for stays as it is.
    """
    if sys.warnoptions:
        return
    # A default of TRL's, of which transformers warns whenever a model or its arguments are made
    warnings.filterwarnings(
        "ignore", message=r"`(is_)?gradient_checkpointing\w*` is deprecated", category=FutureWarning
    )

    def formatted(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if category is UserWarning and str(filename).startswith(_OURS):
            return f"trl {command}: warning: {' '.join(str(message).split())}\n"
        return _format(message, category, filename, lineno, line)

    warnings.formatwarning = formatted
