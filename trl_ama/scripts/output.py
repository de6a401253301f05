"""What commands that only look at something print: a text for people, and JSON for programs."""

import json
import sys
from typing import Any


def show(text: str, path: str | None, result: dict[str, Any]) -> None:
    """Print `text`, and write `result` to the file `path`, if any; `-` prints the JSON instead of the text.

    Raises:
        AMAError: If the file cannot be written.
    """
    from trl_ama.errors import AMAError

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
