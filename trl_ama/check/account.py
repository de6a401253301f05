"""What `ama-check` says of rows that never become pairs, and of pairs that are not to the model what they are to a reader."""

from typing import Any

from ..tasks.account import EMPTY, HELD_OUT
from .verdict import TaskFigures, level_of, percent


_SAME_AS = {
    "same_text": "by their text",
    "same_tokens": "by their tokens",
    "same_after_cut": "up to where max_length cuts them",
}
_WORD = 20  # characters of a word that the tokenizer does not know


def judge_account(figures: TaskFigures, max_length: int | None) -> None:
    """Add the problems that follow from the account of rows, and from what is left of the answers as tokens."""
    for split, found in figures.splits.items():
        where = "" if split == "train" else "held-out "
        _judge_rows(figures, found["rows"], where)
        if "left" in found:
            _judge_equal_answers(figures, split, found, where, max_length)
            _judge_unknown_tokens(figures, found["unknown_tokens"], where)


def _judge_equal_answers(
    figures: TaskFigures, split: str, found: dict[str, Any], where: str, max_length: int | None
) -> None:
    left = found["left"]
    if left["teaches_nothing"]:
        reasons = [f"{left[kind]} {what}" for kind, what in _SAME_AS.items() if left[kind]]
        says = f"{'All' if not left['estimated'] else 'All of the sampled'} {where}pairs have two answers that are the same to the model"
        figures.add(
            "fatal" if split == "train" else "look",
            "no_gradient",
            f"{says} ({', '.join(reasons)}), so "
            + ("no pair sends a gradient." if split == "train" else "nothing can be measured on them."),
            "Let the answers differ in what the model is given.",
        )
    if left["same_tokens"]:
        share = left["same_tokens"] / left["left"]
        figures.add(
            level_of(share, 0.01),
            "same_tokens",
            f"In {percent(share)} of the {where}pairs the answers are other texts but the same tokens: the chat template or the tokenizer "
            "takes away what differs.",
            "Look at them below as the model sees them; many templates leave out reasoning (`<think>…</think>`) or blank ends.",
        )
    if left["same_after_cut"]:
        share = left["same_after_cut"] / found["pairs"]
        figures.add(
            level_of(share, 0.01),
            "same_after_cut",
            f"The answers of {percent(share)} of the {where}pairs are the same up to where max_length ({max_length}) cuts them.",
            "Raise max_length, or set `drop_truncated: true`.",
        )


def _judge_unknown_tokens(figures: TaskFigures, unknown: dict[str, Any] | None, where: str) -> None:
    if unknown is not None:  # of one who speaks seldom, such as the system, a tenth
        columns = ", ".join(f"{percent(share)} of the {column} tokens" for column, share in unknown["share"].items())
        sources = "; ".join(_source(who, source) for who, source in unknown["sources"].items())
        most = max([*unknown["share"].values(), *(source["share"] / 10 for source in unknown["sources"].values())])
        figures.add(
            level_of(most, 0.01),
            "unknown_tokens",
            f"The tokenizer does not know words of the {where}pairs and puts its unknown token in their place: {columns} ({sources}).",
            "The model cannot tell them from any other: write what the tokenizer knows, or take a model of that language.",
        )


def _source(who: str, source: dict[str, Any]) -> str:
    if who == "template":
        return "also in what the chat template adds"
    named = "the texts" if who == "text" else f"{who} messages"
    words = ", ".join(f"“{word[:_WORD]}”" for word in source["words"])
    return f"in {named} {percent(source['share'])}" + (f", e.g. {words}" if words else "")


def _judge_rows(figures: TaskFigures, rows: dict[str, Any], where: str) -> None:
    for reason, count in rows["dropped"].items():
        if reason == EMPTY:
            found = f"drop_empty drops {count} of {rows['read']} {where}pairs: they have an empty answer."
            figures.add("note", "empty_answer", found, "")
        elif reason != HELD_OUT:
            found = f"Of {rows['read']} {where}rows {count} {reason} are left out."
            figures.add(level_of(count / rows["read"], 0.02), "left_out", found, "Mend them, if they are worth it.")
    for what, count in rows["noted"].items():
        figures.add("note", "noted", f"Of {rows['read']} {where}rows {count} {what}.", "")
