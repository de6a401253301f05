r"""Transcripts like those of Anthropic/hh-rlhf, "\n\nHuman: … \n\nAssistant: …", read as conversations.

The two of a pair are one conversation that ends in two answers. A text before the first turn is its system message. Where only one
of them has further turns after its answer begins, these are part of that answer, as in TRL's own conversion of this dataset
(examples/datasets/hh-rlhf-helpful-base.py).
"""

import re
from typing import Any, NamedTuple


# A turn begins the text, or follows an empty line; what is stripped has no empty line before its first turn
_TURN = re.compile(r"(?:\A\s*|\n[^\S\n]*\n)(Human|Assistant):")
_LABEL = re.compile(r"(?i)\Asystem:")
_ROLES = {"Human": "user", "Assistant": "assistant"}

INNER_TURNS = "hold “Human:” or “Assistant:” turns within an answer, kept as its text"
NO_TURNS = "without turns (“Human: …”, an empty line, “Assistant: …”)"
NO_QUESTION = "with nothing before the answer"
NO_ANSWER = "that end with the human's turn"
EMPTY_ANSWER = "with an empty answer"
DIFFER = "that differ before the last turn"


class Reading(NamedTuple):
    """What one row's two transcripts are: `pair`, or why there is none, as a text that follows a number of rows.

    Parameters:
        pair (`dict`, *optional*): `prompt`, `chosen` and `rejected` as lists of messages.
        problem (`str`, *optional*): Why there is no pair.
        note (`str`, *optional*): Something worth knowing of a pair.
    """

    pair: dict[str, list[dict[str, str]]] | None = None
    problem: str | None = None
    note: str | None = None


class _Turn(NamedTuple):
    role: str
    content: str
    start: int  # of its content, in the text


def read_transcripts(row: dict[str, Any]) -> Reading:
    """Read the transcripts `chosen` and `rejected` of a row; if they are answers alone, behind the transcript `prompt`."""
    texts = _with_prompt(row.get("prompt"), {side: row[side] for side in ("chosen", "rejected")})
    turns = {side: _turns(text) for side, text in texts.items()}
    if not all(turns.values()):
        return Reading(problem=NO_TURNS)
    common = _common(turns["chosen"], turns["rejected"])
    ends = {side: len(own) - 1 for side, own in turns.items()}
    at = min(ends.values())
    if common < at:
        return Reading(problem=DIFFER)
    note = INNER_TURNS if ends["chosen"] != ends["rejected"] else None
    if any(own[at].role != "assistant" for own in turns.values()):
        return Reading(problem=NO_ANSWER if note is None else DIFFER)
    prompt = [{"role": turn.role, "content": turn.content} for turn in turns["chosen"][:at]]
    if not prompt:
        return Reading(problem=NO_QUESTION)
    answers = {side: texts[side][own[at].start :].strip() for side, own in turns.items()}
    if not all(answers.values()):
        return Reading(problem=EMPTY_ANSWER)
    sides = {side: [{"role": "assistant", "content": answer}] for side, answer in answers.items()}
    return Reading({"prompt": prompt, **sides}, note=note)


def _with_prompt(prompt: Any, texts: dict[str, str]) -> dict[str, str]:
    """The transcripts, which begin in a column of their own if that holds turns and the others do not begin with any."""
    texts = {side: text.replace("\r\n", "\n") for side, text in texts.items()}
    if isinstance(prompt, str) and _TURN.search(prompt := prompt.replace("\r\n", "\n")):
        start = prompt.strip()
        if not any(_TURN.match(text) or text.strip().startswith(start) for text in texts.values()):
            return {side: prompt + text for side, text in texts.items()}
    return texts


def _turns(text: str) -> list[_Turn]:
    found = list(_TURN.finditer(text))
    if not found:
        return []
    before = _LABEL.sub("", text[: found[0].start()].strip(), count=1).strip()
    turns = [_Turn("system", before, 0)] if before else []
    ends = [match.start() for match in found[1:]] + [len(text)]
    return turns + [
        _Turn(_ROLES[match[1]], text[match.end() : end].strip(), match.end())
        for match, end in zip(found, ends, strict=True)
    ]


def _common(chosen: list[_Turn], rejected: list[_Turn]) -> int:
    """How many turns the two have in common at the beginning."""
    count = 0
    for ours, theirs in zip(chosen, rejected, strict=False):
        if ours[:2] != theirs[:2]:
            break
        count += 1
    return count
