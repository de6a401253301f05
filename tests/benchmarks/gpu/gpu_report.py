"""What a part has found, on disk after every row: one that is killed leaves what it had."""

import contextlib
import json
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class NotHere(Exception):
    """Why something cannot be measured on this machine, as half a sentence."""


class Report:
    """The rows of one part.

    Args:
        path (`Path`): The JSON file that they go to.
        seconds (`float`): What the part has got.
        rehearse (`bool`): Whether this is a rehearsal on a CPU, with tiny models.
    """

    def __init__(self, path: Path, seconds: float, rehearse: bool):
        self.path, self.rehearse = path, rehearse
        self._start, self._seconds = time.monotonic(), seconds
        self.found: dict[str, Any] = {"status": "running", "rows": [], "notes": {}}
        self.save()

    @property
    def left(self) -> float:
        """Seconds that are left of the part's own."""
        return self._start + self._seconds - time.monotonic()

    @contextlib.contextmanager
    def row(self, case: str) -> Iterator[dict[str, Any]]:
        """A row of the table. What goes wrong inside is written into it, and the next row goes on."""
        row: dict[str, Any] = {"case": case}
        try:
            if self.left <= 0:
                row["failed"] = "no time was left"
            yield row
        except NotHere as reason:
            row["not here"] = str(reason)
        except Exception as error:
            row["failed"] = in_a_line(error)
            self.found["notes"][f"where {case} failed"] = without_home(traceback.format_exc()).splitlines()[-8:]
        self.found["rows"].append(row)
        print(json.dumps(row, default=str), flush=True)
        self.save()

    def note(self, key: str, value: Any) -> None:
        """What other parts or people may want to know, and no table has."""
        self.found["notes"][key] = value
        self.save()

    def end(self, status: str, why: str | None = None) -> None:
        self.found |= {"status": status, "seconds": round(time.monotonic() - self._start, 1)}
        if why:
            self.found["why"] = why
        self.save()

    def save(self) -> None:
        self.path.write_text(json.dumps(self.found, indent=1, default=str) + "\n")


def in_a_line(error: BaseException) -> str:
    """What happened, as others may read it."""
    return without_home(f"{type(error).__name__}: {' '.join(str(error).split())}"[:300])


def without_home(text: str) -> str:
    """A text that is sent to others, without the name of who sends it in its paths."""
    return text.replace(str(Path.home()), "~")
