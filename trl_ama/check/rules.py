"""Trivial rules that tell chosen from rejected answers: what a policy can learn instead of the task."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ..evaluate_modules.pairwise_accuracy.formula import accuracy_stderr, pair_accuracy


_LIST_ITEM = re.compile(r"(?m)^\s*(?:[-*•]|\d+[.)])\s")
# Of what an answer has more of → the rule that prefers more of it, and the one that prefers less
_FEATURES: dict[tuple[str, str], Callable[[str], float]] = {
    ("is longer", "is shorter"): len,
    ("has more lines", "has fewer lines"): lambda text: text.count("\n"),
    ("contains a code block", "contains no code block"): lambda text: "```" in text,
    ("contains a list", "contains no list"): lambda text: _LIST_ITEM.search(text) is not None,
    ("contains a link", "contains no link"): lambda text: "://" in text,
}
_WORDS = (1, 3)  # of how many words the beginnings and ends are that are compared


@dataclass
class Rule:
    """A rule that names the chosen answer without reading the prompt, and how often it is right.

    Parameters:
        name (`str`):
            What the chosen answer is said to do. May quote the data.
        accuracy (`float`):
            Share of the training pairs in which that is so; pairs that it cannot decide count half.
        stderr (`float`):
            Standard error of the accuracy, never zero however few the pairs.
        decides (`float`):
            Share of the training pairs that it decides.
        held_out, held_out_stderr (`float`, *optional*):
            The same on the held-out pairs.
    """

    name: str
    accuracy: float
    stderr: float
    decides: float
    held_out: float | None = None
    held_out_stderr: float | None = None


def trivial_rules(train: list[tuple[str, str]], held_out: list[tuple[str, str]]) -> list[Rule]:
    """How well rules that anybody could write tell the answers apart, best first.

    What the rules say (more or less, which beginning and end) is chosen on one half of the training pairs and counted on the
    other, so that a rule that is one among many possible ones is not good by chance.

    Args:
        train, held_out (`list[tuple[str, str]]`): Chosen and rejected answers.
    """
    first, second = (train[0::2], train[1::2]) if len(train) > 1 else (train, train)
    rules = []
    for name, prefers in _candidates(first):
        accuracy, stderr, decides = _count(prefers, second)
        rule = Rule(name, accuracy, stderr, decides)
        if held_out:
            rule.held_out, rule.held_out_stderr, _ = _count(prefers, held_out)
        rules.append(rule)
    return sorted(rules, key=lambda rule: -rule.accuracy)


def _candidates(pairs: list[tuple[str, str]]) -> Iterator[tuple[str, Callable[[str], float]]]:
    for (more, less), feature in _FEATURES.items():
        if _count(feature, pairs)[0] >= 0.5:
            yield more, feature
        else:
            yield less, lambda text, feature=feature: -feature(text)
    seen = set()
    for where, part in (("begins", _beginning), ("ends", _end)):
        for words in _WORDS:
            text, wins = _telling(pairs, lambda answer, part=part, words=words: part(answer, words))
            if text and (where, text) not in seen:
                seen.add((where, text))
                sign = 1 if wins > 0 else -1
                length = len(text.split())

                def prefers(answer: str, text=text, sign=sign, part=part, length=length) -> float:
                    return sign * (part(answer, length) == text)

                yield f"{where if wins > 0 else f'does not {where[:-1]}'} with “{text}”", prefers


def _beginning(answer: str, words: int) -> str:
    return " ".join(answer[:400].split(maxsplit=words)[:words])


def _end(answer: str, words: int) -> str:
    return " ".join(answer[-400:].split()[-words:])


def _telling(pairs: list[tuple[str, str]], part: Callable[[str], str]) -> tuple[str, int]:
    """The text that most often stands on one side of a pair only, and by how much more often on the chosen side."""
    wins: Counter[str] = Counter()
    for chosen, rejected in pairs:
        ours, theirs = part(chosen), part(rejected)
        if ours != theirs:
            wins[ours] += 1
            wins[theirs] -= 1
    return max(wins.items(), key=lambda item: abs(item[1]), default=("", 0))


def _count(feature: Callable[[str], float], pairs: list[tuple[str, str]]) -> tuple[float, float, float]:
    """Accuracy of preferring the answer with more of a feature, its standard error, and the share of pairs it decides."""
    if not pairs:
        return 0.5, 0.5, 0.0
    margins = np.array([float(feature(chosen)) - float(feature(rejected)) for chosen, rejected in pairs])
    accuracy = pair_accuracy(margins)
    # Two more right and two more wrong ones (Agresti and Coull), or a rule without a fault in three pairs would be certain
    stderr = accuracy_stderr((accuracy.sum() + 2) / (len(pairs) + 4), len(pairs) + 4)
    return float(accuracy.mean()), stderr, float((margins != 0).mean())
