"""Held-out pairs on which generalist and specialist differ most, from the evaluation's margins and the reference losses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..common.run_folder import rows_file


EXAMPLES = 4  # of each task
_TOTAL = 240  # of all tasks
_TEXTS = ("prompt", "chosen", "rejected")
_LOGPS = ("specialist_chosen_logps", "specialist_rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
_HELD_OUT = rows_file("test")
_LONGEST = 20_000  # characters of a text; the page shows fewer


def examples_of(
    path: Path, losses: dict[str, Path], tasks: list[str], main: str | None, results: dict[str, Any] | None
) -> tuple[dict[str, list[dict[str, Any]]], str | None]:
    """Of each task the pairs with the largest difference of reward margins between specialist and `main`, largest first.

    Args:
        path (`Path`): Where the margins are.
        losses (`dict[str, Path]`): Task → folder of its reference losses, where the texts are.
        tasks (`list[str]`): Names of the tasks.
        main (`str`, *optional*): The strategy whose generalist is compared.
        results (`dict`, *optional*): The evaluation, which the margins must be of.

    Returns:
        Task → pairs (`pair_id`, `margins` by policy, `texts` or `None`), and a sentence about what is missing, if anything.
    """
    if results is None or main is None or main not in results["policies"]:
        return {}, None  # said already
    scores = _read(path, None)
    again = "Delete results.json and run `trl ama-eval --config …` for examples."
    if scores is None or not {"task", "pair_id", "specialists", main} <= set(scores):
        return {}, f"The margins of single held-out pairs were not kept, so there are no examples. {again}"
    names = np.asarray(scores.pop("task"))
    ids = np.asarray(scores.pop("pair_id"))
    margins = {name: _numbers(values) for name, values in scores.items() if name in results["policies"]}
    if not _same_evaluation(names, margins, results):
        return {}, f"The margins of single held-out pairs are of another evaluation, so there are no examples. {again}"
    count = max(1, min(EXAMPLES, _TOTAL // max(len(tasks), 1)))
    found, without = {}, []
    for task in tasks:
        rows = np.flatnonzero(names == task)
        difference = np.abs(margins["specialists"][rows] - margins[main][rows])
        rows = rows[np.argsort(-difference, kind="stable")[:count]]
        texts = _texts(losses.get(task), [str(ids[row]) for row in rows])
        if len(rows) and not texts:
            without.append(task)
        found[task] = [
            {
                "pair_id": str(ids[row]),
                "margins": {name: float(values[row]) for name, values in margins.items() if name != "base"},
                "texts": texts.get(str(ids[row])),
            }
            for row in rows
        ]
    found = {task: pairs for task, pairs in found.items() if pairs}
    if without:
        return (
            found,
            f"The reference losses hold no texts of {', '.join(without)}, so examples are ids and numbers there.",
        )
    return found, None


def _numbers(values: list[Any]) -> np.ndarray:
    """As an array; what is no number is NaN."""
    return np.array([value if isinstance(value, (int, float)) else np.nan for value in values], dtype=np.float64)


def _same_evaluation(names: np.ndarray, margins: dict[str, np.ndarray], results: dict[str, Any]) -> bool:
    """Whether the pairs' margins have the means that the results have."""
    for name, values in margins.items():
        if not (np.abs(values) < 1e30).all():
            return False
        for task, figures in results["policies"][name]["by_task"].items():
            rows = names == task
            mean = figures.get("margin")
            if mean is not None and (not rows.any() or abs(values[rows].mean() - mean) > 1e-3 * max(1.0, abs(mean))):
                return False
    return True


def _read(path: Path, columns: list[str] | None, **options: Any) -> dict[str, list[Any]] | None:
    """Columns of a Parquet file as lists; `None` if it has not got them, or cannot be read."""
    if not path.is_file():
        return None
    try:
        return pq.read_table(path, columns=columns, **options).to_pydict()
    except (pa.ArrowException, OSError, ValueError, KeyError):
        return None


def _texts(folder: Path | None, pair_ids: list[str]) -> dict[str, dict[str, list[tuple[str, str]]]]:
    """Id of a pair → its texts, each a list of (role, content)."""
    if folder is None or not pair_ids:
        return {}
    table = _read(folder / _HELD_OUT, ["pair_id", *_TEXTS], filters=[("pair_id", "in", pair_ids)])
    if table is None or not all(name in table for name in ("pair_id", "chosen", "rejected")):
        return {}
    texts = {
        pair_id: {name: _messages(table[name][row]) for name in _TEXTS if name in table}
        for row, pair_id in enumerate(table["pair_id"])
    }
    for pair_id, count in _image_counts(folder / _HELD_OUT, pair_ids).items():
        if count and "prompt" in texts.get(pair_id, {}):
            seen = f"{count} image{'s'[: count > 1]}, not shown here"
            texts[pair_id]["prompt"].insert(0, ("", seen))
    return texts


def _image_counts(file: Path, pair_ids: list[str]) -> dict[str, int]:
    """Id of a pair → how many images it has, if pairs have any."""
    counts = {}
    for column in ("images", "image"):
        table = _read(file, ["pair_id", column], filters=[("pair_id", "in", pair_ids)])
        for pair_id, value in zip(table["pair_id"], table.get(column, ()), strict=False) if table else ():
            counts[pair_id] = len(value or ()) if column == "images" else 1
    return counts


def _messages(value: Any) -> list[tuple[str, str]]:
    """A text, or the messages of a conversation."""
    if not isinstance(value, list):
        return [("", "" if value is None else str(value)[:_LONGEST])]
    messages = []
    for message in map(_parsed, value):
        content = message.get("content") if isinstance(message, dict) else message
        if isinstance(content, list) and all(map(_is_shown_part, content)):
            content = "\n".join("[image]" if part["type"] == "image" else part["text"] for part in content)
        role = str(message.get("role") or "") if isinstance(message, dict) else ""
        more = {key: entry for key, entry in message.items() if entry is not None} if role else {}
        more = {key: entry for key, entry in more.items() if key not in ("role", "content")}
        if more or not isinstance(content, str):  # parts of several kinds, calls of tools, …
            shown = content if not role else more if content is None else {"content": content, **more}
            content = json.dumps(shown, ensure_ascii=False, default=str)
        messages.append((role[:40], content[:_LONGEST]))
    return messages


def _parsed(message: Any) -> Any:
    """A message out of a column of Json, or as it is."""
    try:
        return json.loads(message) if isinstance(message, str) else message
    except ValueError:
        return message


def _is_shown_part(part: Any) -> bool:
    """Whether a part of a content is a text, or a place for an image."""
    if not isinstance(part, dict):
        return False
    return part.get("type") == "image" or (part.get("type") == "text" and isinstance(part.get("text"), str))


def loss_stderr(folder: Path | None, fingerprint: dict[str, Any]) -> float | None:
    """Standard error of a specialist's mean held-out loss, for the plain DPO loss; `None` if the pairs are not there.

    Args:
        folder (`Path`, *optional*): The task's reference losses.
        fingerprint (`dict`): Of the specialist's training.
    """
    plain = (
        fingerprint.get("loss_type") == ["sigmoid"]
        and not fingerprint.get("label_smoothing")
        and fingerprint.get("f_divergence_type", "reverse_kl") == "reverse_kl"
        and isinstance(fingerprint.get("beta"), (int, float))
    )
    table = _read(folder / _HELD_OUT, list(_LOGPS)) if folder is not None and plain else None
    if table is None or set(table) != set(_LOGPS) or len(table[_LOGPS[0]]) < 2:
        return None
    own_chosen, own_rejected, chosen, rejected = (np.asarray(table[name], dtype=np.float64) for name in _LOGPS)
    losses = np.logaddexp(0.0, -fingerprint["beta"] * ((own_chosen - chosen) - (own_rejected - rejected)))
    error = float(losses.std(ddof=1) / np.sqrt(len(losses)))
    return error if np.isfinite(error) else None
