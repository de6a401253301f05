"""What is wrong with a task's pairs, how much that matters, and what to do about it, a sentence each."""

from dataclasses import dataclass, field
from typing import Any

from ..evaluate_modules.pairwise_accuracy.formula import accuracy_stderr
from .rules import Rule


OK, LOOK, FATAL = "OK", "look at this", "will not train"
# A trivial rule is worth a look if it is surely (two standard errors) this good
LEAK = 0.65
_IMBALANCE = 10
_FEW = 100
_COPIES = "Drop the copies; the page “Your own data” has the lines that do it."
_LENGTH_RULES = ("is longer", "is shorter")
# Kind of mistake → share of the pairs from which it is worth a look, what is found, and the fix
_MISTAKES = {
    "mixed_forms": (
        0.0,
        "mix messages and plain text, or lack a prompt or an answer",
        "Bring prompt, chosen and rejected of every row into one form; `format: single_turn` makes messages of plain strings.",
    ),
    "empty_prompt": (0.01, "have an empty prompt", "Drop them, unless answers to nothing are what you train."),
    "empty_answer": (0.0, "have an empty answer", "Drop such rows."),
    "prompt_in_answer": (
        0.05,
        "repeat the prompt within the chosen answer",
        "Take it out of chosen and rejected, or leave the column `prompt` out: it is then what both answers begin with.",
    ),
    "transcript": (
        0.01,
        "hold a transcript (“Human: …”) or another model's chat format as plain text",
        "Make messages of it (`format: hh_rlhf` for “Human: … Assistant: …”), or the base model's chat template is not used.",
    ),
    "last_not_assistant": (
        0.0,
        "have an answer whose last message is not the assistant's",
        "End chosen and rejected with a message of role `assistant`.",
    ),
    "prompt_ends_with_assistant": (
        0.01,
        "have a prompt that ends with the assistant's message",
        "Move that message into chosen and rejected, or drop the pairs.",
    ),
    "unknown_role": (
        0.0,
        "have a message with a role that chat templates do not know",
        "Rename the roles to `system`, `user`, `assistant` and `tool` (ShareGPT's `human` and `gpt` are user and assistant).",
    ),
    "json_text": (
        0.001,
        "hold messages as the text of a JSON list",
        "Make messages of them; `format: json_messages` reads files in which all rows are so.",
    ),
    "special_token": (
        0.001,
        "hold one of the tokenizer's special tokens as text",
        "Remove it: the chat template writes these tokens, and text that holds them can end a turn.",
    ),
}


@dataclass
class Problem:
    """Something about a task's pairs.

    Parameters:
        level (`str`):
            `"note"`, `"look"` or `"fatal"`.
        kind (`str`):
            A short name, for programs.
        found (`str`):
            What was found, a sentence.
        fix (`str`):
            What to do about it, a sentence.
    """

    level: str
    kind: str
    found: str
    fix: str


@dataclass
class TaskFigures:
    """What [`trl_ama.check.check.check_data`] found out about a task.

    Parameters:
        task (`str`):
            Its name.
        splits (`dict`):
            `train` and, if any, `test` → how many `pairs` were loaded and `looked_at`, token `lengths`, `mistakes` by kind
            (how many, row and prompt of the first), and what is `left` of them after what the pipeline drops;
            the account of the `rows` that were read, and shares of `unknown_tokens`.
        rules (`list[Rule]`):
            Trivial rules, best first.
        duplicates (`dict`):
            See [`trl_ama.check.duplicates.duplicates`].
        problems (`list[Problem]`):
            What is wrong.
        shown (`list[dict]`):
            A few pairs as the model sees them.
    """

    task: str
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)
    rules: list[Rule] = field(default_factory=list)
    duplicates: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    shown: list[dict[str, Any]] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """`"OK"`, `"look at this"` or `"will not train"`."""
        levels = {problem.level for problem in self.problems}
        return FATAL if "fatal" in levels else LOOK if "look" in levels else OK

    def add(self, level: str, kind: str, found: str, fix: str) -> None:
        """Note a problem."""
        self.problems.append(Problem(level, kind, found, fix))


def percent(share: float) -> str:
    """A share for people: no 0 % that is not one."""
    return f"{100 * share:.0f} %" if share >= 0.1 or share == 0 else f"{100 * share:.2g} %"


def level_of(share: float, look_from: float) -> str:
    """Whether a share is worth a look, or a note only."""
    return "look" if share >= look_from else "note"


def judge(figures: TaskFigures, max_length: int | None, drops_truncated: bool) -> None:
    """Add the problems that follow from a task's figures."""
    for split, found in figures.splits.items():
        where = "" if split == "train" else "held-out "
        _judge_mistakes(figures, split, found, where)
        if "lengths" in found:
            _judge_lengths(figures, split, found, where, max_length, drops_truncated)
    if figures.duplicates:
        _judge_duplicates(figures, figures.duplicates)
    for rule in figures.rules[:1]:
        if rule.accuracy - 2 * rule.stderr >= LEAK:
            if rule.held_out is None or rule.held_out - 2 * rule.held_out_stderr >= 0.5:
                figures.add(
                    "look",
                    "leak",
                    f"The answer that {rule.name} is the chosen one in {percent(rule.accuracy)} of the pairs, so that rule alone "
                    f"has an accuracy of {rule.accuracy:.2f}.",
                    "Add pairs in which it is the other way round, or drop pairs until it is not"
                    + ("; or use `loss_type: [sigmoid_norm]` or `ld_alpha`." if rule.name in _LENGTH_RULES else "."),
                )
    if figures.splits and "test" not in figures.splits:
        figures.add(
            "look",
            "no_held_out",
            "There are no held-out pairs, so nothing will say how good the models are.",
            "Set `eval_split`, or `test_split_size: 0.1` for all tasks.",
        )
    elif "left" in figures.splits.get("test", {}):
        count = figures.splits["test"]["left"]["left"]
        if count == 0:
            figures.add(
                "look", "few_held_out", "No held-out pair is left.", "Hold out pairs that fit into max_length."
            )
        elif count < _FEW:
            stderr = accuracy_stderr(0.5, count)
            figures.add(
                "note",
                "few_held_out",
                f"Only {count} held-out pairs are left, so an accuracy has a standard error of up to {stderr:.2f}.",
                "Hold out more.",
            )


def _judge_mistakes(figures: TaskFigures, split: str, found: dict[str, Any], where: str) -> None:
    for kind, (count, row, prompt) in found["mistakes"].items():
        look_from, says, fix = _MISTAKES[kind]
        share = count / found["looked_at"]
        if kind == "prompt_in_answer" and share < look_from:
            continue  # answers do quote questions
        level = "fatal" if kind in ("mixed_forms", "empty_answer") else level_of(share, look_from)
        figures.add(
            level,
            kind,
            f"{count} of {found['looked_at']} {where}pairs {says} (the first is row {row} of {split}, “{prompt}…”).",
            fix,
        )


def _judge_lengths(
    figures: TaskFigures, split: str, found: dict[str, Any], where: str, max_length: int | None, drops_truncated: bool
) -> None:
    left, total = found["left"], found["pairs"]
    over = found["over_max_length"]
    most = f"Raise max_length ({found['holds_95_percent']} holds 95 % of the pairs whole)"
    if over and not drops_truncated:
        figures.add(
            level_of(over, 0.1),
            "truncated",
            f"{percent(over)} of the {where}pairs are longer than max_length ({max_length}) and are cut.",
            f"{most}, or set `drop_truncated: true`." if over < 1 else f"{most}.",
        )
    if left["drop_truncated"]:
        share = left["drop_truncated"] / total
        level = "fatal" if left["drop_truncated"] == total and split == "train" else level_of(share, 0.5)
        figures.add(
            level,
            "drop_truncated",
            f"drop_truncated drops {percent(share)} of the {where}pairs: they are longer than max_length ({max_length}).",
            f"{most}, or turn drop_truncated off.",
        )
    if left["prompt_fills_max_length"]:
        share = left["prompt_fills_max_length"] / total
        level = "fatal" if left["left"] == 0 and split == "train" else level_of(share, 0.05)
        figures.add(
            level,
            "prompt_fills_max_length",
            f"The prompts of {percent(share)} of the {where}pairs fill max_length ({max_length}) alone, and DPOTrainer drops them.",
            "Raise max_length, or shorten the prompts.",
        )


def _judge_duplicates(figures: TaskFigures, counts: dict[str, Any]) -> None:
    pairs, held_out = counts["pairs"], counts.get("held_out_pairs", 0)

    def add(kind: str, count: int, of: int, look_from: float, found: str, fix: str) -> None:
        if count:
            figures.add(level_of(count / of, look_from), kind, f"{found.format(f'{count} of {of}')}.", fix)

    add(
        "same_answers", counts["same_answers"], pairs, 0.001,
        "In {} pairs chosen and rejected are the same text", "Drop them: they teach nothing.",
    )  # fmt: skip
    add("repeated_pairs", counts["repeated_pairs"], pairs, 0.01, "{} pairs repeat an earlier one", _COPIES)
    add(
        "contradictions", counts["contradictions"], pairs, 0.005,
        "{} pairs are there the other way round too: chosen here, rejected there", "Keep one of the two, or none.",
    )  # fmt: skip
    for other, count in counts["contradicted_by"].items():
        add(
            "contradicted_by", count, pairs, 0.005, f"{{}} pairs contradict a pair of task '{other}'",
            "If that is what sets the tasks apart, tell them apart in the prompt; else drop them from one task.",
        )  # fmt: skip
    for other, count in counts["shared_pairs"].items():
        add(
            "shared_pairs", count, pairs, 0.01, f"{{}} pairs are in task '{other}' too",
            "Drop them from one of the two, so that they count once.",
        )  # fmt: skip
    add(
        "held_out_in_training", counts.get("held_out_in_training", 0), held_out, 0.005,
        "{} held-out pairs are trained on, in this task or another", "Drop them from the training pairs; the page “Your own data” has the lines that do it.",
    )  # fmt: skip
    prompts = counts.get("held_out_prompts_in_training", 0) - counts.get("held_out_in_training", 0)
    add(
        "held_out_prompts_in_training", prompts, held_out, 0.05,
        "The prompts of {} other held-out pairs are trained on with other answers", "Split by prompt, not by pair.",
    )  # fmt: skip


def judge_sizes(tasks: list[TaskFigures]) -> None:
    """Add what follows from the sizes of all tasks together."""
    sizes = {figures.task: figures.splits["train"]["left"]["left"] for figures in tasks if _trains(figures)}
    total = sum(sizes.values())
    for figures in tasks:
        size = sizes.get(figures.task)
        if size and max(sizes.values()) >= _IMBALANCE * size:
            times = max(sizes.values()) / size
            figures.add(
                "look",
                "imbalance",
                f"The largest task has {times:.0f} times as many pairs, and `proportional` draws this one {percent(size / total)} of "
                "the time.",
                "Use `ama_s`, `ama_r` or `uniform`; they repeat a small task's pairs, so watch its held-out excess.",
            )


def _trains(figures: TaskFigures) -> bool:
    return figures.verdict != FATAL and "left" in figures.splits.get("train", {})
