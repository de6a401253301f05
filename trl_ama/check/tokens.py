"""What becomes of pairs as tokens: which answers a template, a tokenizer or a cut makes the same, and which words turn into none."""

from collections import Counter
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..dpo.tokens import PAIR_IDS
from ..tasks.forms import PAIR_COLUMNS


_ROWS = 200  # in which the words behind unknown tokens are looked for
_WORDS = 3


def unknown_tokens(
    tokenised: Dataset, pairs: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any] | None:
    """How many tokens are the tokenizer's unknown one, which stands for any word; `None` if none are.

    Returns:
        `share` by column of all its tokens, and `sources`, by who says it (a role, `text`, or `template` for the words that the chat
        template adds), of the first pairs that have some: the `share`, and a few of the `words`.
    """
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in (
        tokenizer.eos_token_id,
        tokenizer.bos_token_id,
    ):  # then the token has another meaning
        return None
    found, total, rows = Counter(), Counter(), []
    for number, row in enumerate(tokenised.select_columns(list(PAIR_IDS))):
        counts = {column: row[f"{column}_ids"].count(unknown) for column in PAIR_COLUMNS}
        found.update(counts)
        total.update({column: len(row[f"{column}_ids"]) for column in PAIR_COLUMNS})
        if any(counts.values()) and len(rows) < _ROWS:
            rows.append((number, counts["prompt"]))
    if not rows:
        return None
    return {
        "share": {column: found[column] / total[column] for column in PAIR_COLUMNS if found[column]},
        "sources": _sources(rows, pairs, tokenizer),
    }


def _sources(
    rows: list[tuple[int, int]], pairs: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> dict[str, dict[str, Any]]:
    counts: dict[str, np.ndarray] = {}  # of unknown tokens and of all
    words: dict[str, Counter[str]] = {}
    for number, in_prompt in rows:
        for column in PAIR_COLUMNS:
            said = 0
            for who, text in _texts(pairs[number][column]):
                ids, unreadable = _unreadable(text, tokenizer)
                said += len(unreadable)
                counts[who] = counts.get(who, np.zeros(2, dtype=int)) + [len(unreadable), ids]
                words.setdefault(who, Counter()).update(unreadable)
            if column == "prompt" and in_prompt > said:
                counts["template"] = counts.get("template", np.zeros(2, dtype=int)) + [in_prompt - said] * 2
    return {
        who: {
            "share": float(some / every),
            "words": [word for word, _ in words.get(who, Counter()).most_common(_WORDS) if word],
        }
        for who, (some, every) in counts.items()
        if some
    }


def _texts(side: Any) -> list[tuple[str, str]]:
    if isinstance(side, str):
        return [("text", side)]
    return [(message["role"], text) for message in side or [] for text in _contents(message.get("content"))]


def _contents(content: Any) -> list[str]:
    """The texts of a message's content, also of one in parts."""
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return [text for text in texts if isinstance(text, str)]


def _unreadable(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, list[str]]:
    """How many tokens a text has, and the words in it that the tokenizer does not know."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
    ids, unknown = encoded["input_ids"], tokenizer.unk_token_id
    spans = encoded["offset_mapping"] if tokenizer.is_fast else [(0, 0)] * len(ids)
    return len(ids), [
        text[start:end].strip() for token, (start, end) in zip(ids, spans, strict=True) if token == unknown
    ]
