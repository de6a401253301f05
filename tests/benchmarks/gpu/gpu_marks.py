"""The pass marks of `make gpu`, judged on what the parts have found."""

from collections.abc import Iterator
from typing import Any


ERROR = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 1e-2}  # relative, of log-probs, outputs and gradients
AS_PLAIN = 1.25  # times the plain path's own error in 16 bits, where that is above the mark
TIME, LONG_TIME, LONG = 1.05, 0.5, 1024  # of DPOTrainer's with a precomputed reference; from so many tokens on
PLAN = 0.1


def judge(parts: dict[str, dict[str, Any]], rehearsal: bool) -> list[dict[str, Any]]:
    """Every mark, the case it was held against, and whether it is met.

    Args:
        parts (`dict`): What each part has found, by name.
        rehearsal (`bool`): Whether it ran on a CPU, where neither time nor memory counts.
    """
    marks = []
    for name, part in parts.items():
        for mark in _of_part(name, part):
            if not (rehearsal and mark["mark"] in ("time", "memory", "plan")):
                marks.append({"part": name, **mark})
    return marks


def _of_part(name: str, part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    status = part["status"]
    if status != "skipped":
        ended = status == "done"
        yield _mark("ran", "the part", f"{status}{': ' + part['why'] if part.get('why') else ''}", "done", ended)
    for row in part.get("rows", []):
        case = row["case"]
        if "failed" in row:
            yield _mark("ran", case, row["failed"], "done", False)
        if "not here" in row or "failed" in row:
            continue
        if "error" in row and row.get("way", "fast path") == "fast path":
            for kind in ("error", "gradient error"):
                limit = max(ERROR[row["type"]], AS_PLAIN * row.get(f"plain path: {kind}", 0.0))
                yield _mark(kind, f"{case}, {row['type']}", row[kind], limit, row[kind] <= limit)
        if "fast" in row:
            taken = f"{row['fast']} fast, {row['plain']} plain"
            yield _mark("fast path", case, taken, "none plain", row["fast"] > 0 and not row["plain"])
        if "ours / trl" in row:
            limit = LONG_TIME if row.get("length", 0) >= LONG else TIME
            yield _mark("time", case, row["ours / trl"], limit, row["ours / trl"] <= limit)
        if "trl GiB" in row:
            yield _mark("memory", case, row["ours GiB"], row["trl GiB"], row["ours GiB"] <= row["trl GiB"])
        if "planned / measured" in row:
            ratio = row["planned / measured"]
            yield _mark("plan", case, ratio, f"1 ± {PLAN}", abs(ratio - 1) <= PLAN)
        if name == "resume" and case == "full_determinism":
            yield _mark("same bits", case, row["same bits"], True, row["same bits"])
        if "log-probs" in row:
            yield _mark("log-probs in float32", case, row["log-probs"], "float32", row["log-probs"] == "float32")


def _mark(mark: str, case: str, value: Any, limit: Any, met: bool) -> dict[str, Any]:
    return {"mark": mark, "case": case, "value": value, "limit": limit, "met": bool(met)}
