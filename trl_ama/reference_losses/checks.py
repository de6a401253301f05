"""What reference losses on disk must be before a number of them is used. A stranger may have written them."""

import glob
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, List, Value, load_dataset

from ..common.errors import AMAError, first_line
from ..tasks.forms import EXTRA_COLUMNS, PAIR_COLUMNS, pair_id_of, says_something
from ..tasks.images import IMAGE_COLUMNS, check_embedded
from ..tasks.pairs import PAIR_ID_COLUMN, TASK_COLUMN
from .columns import LOGP_COLUMNS, TOKEN_COLUMNS


_AGAIN = "Get an intact copy, or delete the task's folder and compute it again with `trl ama-losses --config …`."
# Column → the types that it may have in a file; the first is what it is read as
_TYPES = {
    TASK_COLUMN: ("string", "large_string"),
    PAIR_ID_COLUMN: ("string", "large_string"),
    **dict.fromkeys(LOGP_COLUMNS, ("float32", "float64")),
    **dict.fromkeys(TOKEN_COLUMNS, ("int32", "int64")),
}
# Anything else (Image, Audio, …) may open files that a row names; images are checked row by row
_PLAIN_FEATURES = ("Value", "List", "LargeList", "Sequence", "Json")
_POSITIVE_LOGP = 1e-3  # nats; log-probs of a sure token round to a little above zero
_LOWEST_LOGP = -1e5  # nats a token; no logit of 16 bits is below that, and sums of it are still finite
_MOST_TOKENS = 2**31 - 1
# Ids are hashes of 24 hexadecimal digits, which nothing packs into fewer bytes. A file with more rows than that allows
# holds something else, and might fill the disk when it is unpacked
_BYTES_PER_ROW = 12
_SHOWN = 200  # characters of what a stranger wrote


def shown(value: Any) -> str:
    """What a stranger wrote, short and without control characters, for a message of one line."""
    text = "".join(character if character.isprintable() else " " for character in str(value)[: _SHOWN + 1])
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def sha256(path: Path) -> str:
    """Hash of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_file(path: Path, noted: dict[str, Any], what: str) -> None:
    """Hold a Parquet file's footer and hash against the note, before a row of it is read.

    Raises:
        AMAError: If it is missing, damaged, not the file that the note describes, or has other columns than it must.
    """
    if not path.is_file():
        raise AMAError(f"There are no reference losses {what}, though the note beside them lists that file. {_AGAIN}")
    try:
        schema, rows = pq.read_schema(path), pq.read_metadata(path).num_rows
        features = Features.from_arrow_schema(schema)
    except Exception as error:  # pyarrow and datasets raise many kinds; all mean a damaged file
        raise _unreadable(what, error) from error
    if rows != noted["rows"]:
        raise AMAError(
            f"The reference losses {what} have {rows} rows, the note beside them says {shown(noted['rows'])}. {_AGAIN}"
        )
    size = path.stat().st_size
    if rows < 1 or rows * _BYTES_PER_ROW > size:
        raise AMAError(f"The reference losses {what} cannot be {rows} rows in {size} bytes. {_AGAIN}")
    found = shown(", ".join(map(repr, features)))
    for column, types in _TYPES.items():
        if column not in features:
            raise AMAError(f"The reference losses {what} have no column '{column}'; found {found}. {_AGAIN}")
        kind = getattr(features[column], "dtype", type(features[column]).__name__)
        if kind not in types:
            raise AMAError(
                f"Column '{column}' of the reference losses {what} is {shown(kind)}, it must be {types[0]}. {_AGAIN}"
            )
    unknown = sorted(set(features) - {*_TYPES, *PAIR_COLUMNS, *EXTRA_COLUMNS})
    if unknown:
        raise AMAError(
            f"The reference losses {what} have the column '{shown(unknown[0])}', which does not belong there. {_AGAIN}"
        )
    for column in sorted(set(features) - set(_TYPES)):
        if column in IMAGE_COLUMNS:
            sound, kind = features[column] in (Image(), List(Image())), "images"
        else:
            sound, kind = _is_plain(features[column]), "text"
        if not sound:
            raise AMAError(
                f"Column '{column}' of the reference losses {what} is {shown(features[column])}, not {kind}. {_AGAIN}"
            )
    if sha256(path) != noted["sha256"]:
        raise AMAError(f"The reference losses {what} are not the file that the note beside them describes. {_AGAIN}")


def _unreadable(what: str, error: Exception) -> AMAError:
    return AMAError(f"The reference losses {what} cannot be read: {shown(first_line(error))} {_AGAIN}")


def _is_plain(feature: Any) -> bool:
    if isinstance(feature, dict):
        return all(map(_is_plain, feature.values()))
    if type(feature).__name__ not in _PLAIN_FEATURES:
        return False
    inner = getattr(feature, "feature", None)
    return inner is None or _is_plain(inner)


def read_rows(path: Path, task: str, what: str) -> Dataset:
    """Read a file that passed [`check_file`], and check its rows.

    Raises:
        AMAError: If a row is not a pair of `task` with an id of its own and log-probs that can be.
    """
    try:
        rows = load_dataset("parquet", data_files=glob.escape(str(path)), split="train")
        check_rows(rows, task, what)
        # One type whatever the file has, so that the rows of several tasks can be put together
        types = {name: Value(_TYPES[name][0]) for name in _TYPES}
        features = Features({**rows.features, **types})
        return rows if features == rows.features else rows.cast(features)
    except AMAError:
        raise
    except Exception as error:  # also from single values, which are decoded late
        raise _unreadable(what, error) from error


def check_rows(rows: Dataset, task: str, what: str) -> None:
    """Raise an `AMAError` unless every row is a pair of `task` with an id of its own and log-probs that can be."""
    columns = rows.select_columns(list(_TYPES)).with_format("arrow")[:]
    owners = columns[TASK_COLUMN].unique().to_pylist()
    if owners != [task]:
        other = next((owner for owner in owners if owner != task), None)
        raise AMAError(
            f"The reference losses {what} hold rows of task {shown(repr(other))}, but belong to '{task}'. {_AGAIN}"
        )
    _check_ids(columns[PAIR_ID_COLUMN].to_pylist(), what)
    tokens = {}
    for column in TOKEN_COLUMNS:
        tokens[column] = counts = columns[column].to_numpy().astype(np.float64)  # a missing one is NaN
        if not ((counts >= 0) & (counts <= _MOST_TOKENS)).all():
            raise AMAError(
                f"Column '{column}' of the reference losses {what} has missing or negative counts, or some that no answer "
                f"has. {_AGAIN}"
            )
    for column in LOGP_COLUMNS:
        logps = columns[column].to_numpy().astype(np.float64)
        counts = tokens["chosen_tokens" if "chosen" in column else "rejected_tokens"]
        for bad, problem in (
            (~np.isfinite(logps), "is missing or not finite"),
            (logps > _POSITIVE_LOGP, "has a positive value"),
            (logps < _LOWEST_LOGP * np.maximum(counts, 1), "has too low a value"),
        ):
            if bad.any():
                row = int(np.flatnonzero(bad)[0])
                raise AMAError(
                    f"Column '{column}' of the reference losses {what} {problem} in row {row} ({logps[row]:.3g}), which no "
                    f"log-prob can be. {_AGAIN}"
                )
    _check_texts(rows, what)


def _check_ids(ids: list[str | None], what: str) -> None:
    if any(not name for name in ids):
        raise AMAError(f"The reference losses {what} have rows without a pair_id. {_AGAIN}")
    if len(set(ids)) < len(ids):
        seen: set[str] = set()
        double = next(name for name in ids if name in seen or seen.add(name))
        raise AMAError(f"The reference losses {what} have the pair_id '{shown(double)}' more than once. {_AGAIN}")


def _check_texts(rows: Dataset, what: str) -> None:
    present = [column for column in PAIR_COLUMNS if column in rows.column_names]
    if present and len(present) < len(PAIR_COLUMNS):
        raise AMAError(f"The reference losses {what} have {present} of the texts {list(PAIR_COLUMNS)}. {_AGAIN}")
    if not present:
        return
    extra = [column for column in EXTRA_COLUMNS if column in rows.column_names]
    check_embedded(rows, lambda problem: AMAError(f"{problem} (the reference losses {what}). {_AGAIN}"))
    for number, row in enumerate(rows.select_columns([PAIR_ID_COLUMN, *PAIR_COLUMNS, *extra])):
        problem = _text_problem(row)
        if problem is not None:
            raise AMAError(f"Row {number} of the reference losses {what} has {problem}. {_AGAIN}")
        if pair_id_of(row) != row[PAIR_ID_COLUMN]:
            raise AMAError(
                f"Row {number} of the reference losses {what} has the pair_id '{shown(row[PAIR_ID_COLUMN])}', which is not that "
                f"of its text: its numbers belong to another pair. {_AGAIN}"
            )


def _text_problem(row: dict[str, Any]) -> str | None:
    """What is wrong with a pair's texts, which may be strings or conversations."""
    if len({type(row[column]) for column in PAIR_COLUMNS}) > 1:
        return "a prompt, chosen and rejected of different kinds"
    for column in PAIR_COLUMNS:
        text = row[column]
        if isinstance(text, list):
            if not all(isinstance(turn, dict) and isinstance(turn.get("role"), str) for turn in text):
                return f"messages without a role in '{column}'"
        if not isinstance(text, (str, list)) or (column != "prompt" and not says_something(text)):
            return f"no text in '{column}'"
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = json.loads(tools)
    if not isinstance(tools, (list, type(None))) or not isinstance(
        row.get("chat_template_kwargs"), (dict, type(None))
    ):
        return "'tools' that are no list, or 'chat_template_kwargs' that are no mapping"
    return None
