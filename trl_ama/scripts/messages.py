"""What a command prints: its results as text or JSON, and our own warnings in one line."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

from trl_ama.common.errors import AMAError


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


def show(text: str, path: str | None, result: dict[str, Any]) -> None:
    """Print `text`, and write `result` to the file `path`, if any; `-` prints the JSON instead of the text.

    Raises:
        AMAError: If the file cannot be written.
    """
    if path == "-":
        print(json.dumps(result, indent=1), flush=True)
        return
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    if path is None:
        return
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)
    except OSError as error:
        raise AMAError(f"The file {path} cannot be written ({error.strerror}); give --json another path.") from error
