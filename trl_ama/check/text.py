"""The report of [`check_data`] as text for a terminal."""

import textwrap
from collections.abc import Iterator
from typing import Any

from ..report.markdown import table
from ..tasks.account import RowAccount
from .check import DataCheck
from .rules import Rule
from .verdict import FATAL, LEAK, LOOK, TaskFigures, percent


_SHOWN = 1500  # characters of a prompt or answer; what is left out is counted
_RULES = 4
_CELL = 120
_SPLITS = {"train": "train", "test": "held out"}


def safe(text: str) -> str:
    """`text` with every character that a terminal would act upon, or not show, written as its escape.

    Beside control characters and line ends these are the invisible ones that change the direction of writing.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in str(text)
    )


def render(check: DataCheck) -> str:
    """The report: the tasks one after the other, the summary last, where a terminal ends. Safe to print."""
    return "\n".join(safe(line) for line in _lines(check)) + "\n"


def _lines(check: DataCheck) -> Iterator[str]:
    read = (
        "all pairs"
        if check.sample is None
        else f"up to {check.sample:,} pairs of each task and split (seed {check.seed})"
    )
    length = "none" if check.max_length is None else f"{check.max_length} ({check.truncation_mode})"
    yield f"Tokenizer of {check.model}, max_length {length}; {read} read, duplicates among all"
    for figures in check.tasks:
        yield ""
        yield f"## {figures.task}: {figures.verdict}"
        yield ""
        for problem in figures.problems:
            yield f"- {problem.level}: {' '.join(f'{problem.found} {problem.fix}'.split())}"
        if figures.problems:
            yield ""
        yield from _tables(figures)
        for row in figures.shown:
            yield from _row(row)
    yield ""
    yield "## Summary"
    yield ""
    yield from _summary(check.tasks).splitlines()
    yield ""
    yield _next(check)


def _tables(figures: TaskFigures) -> Iterator[str]:
    rows = [
        ["tokens: median / 90 % / max", "prompt", "chosen", "rejected", "prompt + longer answer", "over max_length"]
    ]
    for split, found in figures.splits.items():
        if "lengths" in found:
            lengths = found["lengths"]
            cells = [
                f"{lengths[name]['median']:.0f} / {lengths[name]['90%']:.0f} / {lengths[name]['max']}"
                for name in ("prompt", "chosen", "rejected", "pair")
            ]
            rows.append([_SPLITS[split], *cells, percent(found["over_max_length"])])
    if len(rows) > 1:
        yield from table(rows).splitlines()
        yield ""
    for split, found in figures.splits.items():
        if "left" in found:
            yield f"{_SPLITS[split]}: {_drops(found)}"
    if figures.duplicates:
        yield f"repeated: {_repeated(figures.duplicates)}"
    if figures.rules:
        yield ""
        telling = [rule for rule in figures.rules if rule.decides]
        best = [rule for at, rule in enumerate(telling) if at < _RULES or rule.accuracy >= LEAK]
        yield from _rules(best, "test" in figures.splits).splitlines()


def _drops(found: dict[str, Any]) -> str:
    left = found["left"]
    about = "about " if left["estimated"] else ""
    reasons = (
        ("drop_truncated", "longer than max_length (drop_truncated)"),
        ("max_pairs", "beyond max_train_pairs or max_eval_pairs"),
        ("prompt_fills_max_length", "whose prompt fills max_length"),
    )
    dropped = [f"{about}{left[key]:,} {reason}" for key, reason in reasons if left[key]]
    rows = found["rows"]
    read = str(RowAccount("", "", rows["read"], rows["dropped"], rows["noted"], rows["kept"]))
    if not dropped:
        return read if rows["dropped"] else f"{read}, none dropped"
    return f"{read}; of the pairs" + "".join(f" − {item}" for item in dropped) + f" = {about}{left['left']:,}"


def _repeated(counts: dict[str, Any]) -> str:
    parts = [f"{counts['repeated_pairs']:,} pairs, {counts['repeated_prompts']:,} prompts beyond their first time"]
    if counts.get("held_out_pairs"):
        parts.append(
            f"of {counts['held_out_pairs']:,} held-out pairs {counts['held_out_in_training']:,} (by prompt "
            f"{counts['held_out_prompts_in_training']:,}) are trained on"
        )
    return "; ".join(parts)


def _rules(rules: list[Rule], held_out: bool) -> str:
    rows = [["“chosen is the answer that …”", "decides", "accuracy", *(["held out"] if held_out else [])]]
    for rule in rules:
        cells = [rule.name.replace("|", "¦"), percent(rule.decides), f"{rule.accuracy:.3f} ± {rule.stderr:.3f}"]
        if held_out:
            known = rule.held_out is not None
            cells.append(f"{rule.held_out:.3f} ± {rule.held_out_stderr:.3f}" if known else "–")
        rows.append(cells)
    return table(rows)


def _row(row: dict[str, Any]) -> Iterator[str]:
    yield ""
    dropped = f" if it were not dropped ({row['dropped']})" if row["dropped"] else ""
    yield f"pair {row['row']}, as the model sees it{dropped}:"
    for side in ("prompt", "chosen", "rejected"):
        cuts = [
            f"{count} tokens of the {what} cut at the beginning"
            for what, count in _prompt_cuts(row)
            if side == "prompt"
        ]
        if row["cut"].get(side):
            cuts.append(f"max_length CUTS {row['cut'][side]} of them, which are not shown")
        notes = "".join(f"; {cut}" for cut in cuts)
        yield f"  {side} ({row['tokens'][side]} tokens{notes})"
        for line in _shortened(row[side]).split("\n"):
            # Behind a bar, so that no line of the data can be taken for one of the report
            yield f"  │ {line}"


def _prompt_cuts(row: dict[str, Any]) -> Iterator[tuple[str, int]]:
    for what, count in row["cut"].items():
        if what.startswith("prompt ") and count:
            yield what, count


def _shortened(text: str) -> str:
    if len(text) <= _SHOWN:
        return text
    half = _SHOWN // 2
    return f"{text[:half]} [… {len(text) - 2 * half:,} characters are not shown …] {text[-half:]}"


def _next(check: DataCheck) -> str:
    """What to do after reading all that."""
    by_verdict = {
        verdict: [figures.task for figures in check.tasks if figures.verdict == verdict] for verdict in (FATAL, LOOK)
    }
    if by_verdict[FATAL]:
        names = ", ".join(by_verdict[FATAL])
        return f"{len(by_verdict[FATAL])} of {len(check.tasks)} tasks will not train ({names}): mend them, and run this again."
    if check.model_problem is not None:
        return f"The pairs are sound, but the model will not train: {check.model_problem}"
    if by_verdict[LOOK]:
        return f"Every task will train. Look first at what is said above of {', '.join(by_verdict[LOOK])}."
    return "Every task will train. `trl ama-plan` with the same flags says what the run will need."


def _summary(tasks: list[TaskFigures]) -> str:
    rows = [["task", "verdict", "first thing to do", "pairs to train on", "held out"]]
    for figures in tasks:
        left = [
            f"{found['left']['left']:,}" if "left" in (found := figures.splits.get(split, {})) else "–"
            for split in _SPLITS
        ]
        worst = next((problem for problem in figures.problems if problem.level != "note"), None)
        todo = "" if worst is None else " ".join((worst.fix or worst.found).split()).replace("|", "¦")
        todo = textwrap.shorten(todo, _CELL, placeholder=" …")
        rows.append([figures.task, figures.verdict, todo, *left])
    return table(rows, numbers=2)
