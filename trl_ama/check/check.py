"""Looks at the pairs of a recipe before anything is trained: as the model sees them, and at what may be wrong with them.

Reads the tokenizer and the base model's configuration, never its weights.
"""

import dataclasses
import re
from collections import Counter
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Value
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..common.errors import AMAError, first_line
from ..dpo.config import AMAConfig
from ..dpo.tokens import SAME_AFTER_CUT, SAME_TEXT, SAME_TOKENS, equal_answers, token_counts, tokenise
from ..recipe.recipe import Recipe
from ..recipe.rehearsal import model_problem
from ..recipe.settings import RunSettings
from ..tasks.account import RowAccount
from ..tasks.forms import PAIR_COLUMNS, TEMPLATE_COLUMNS
from ..tasks.images import has_images
from ..tasks.loading import read_tasks
from ..tasks.no_tasks import no_tasks
from ..tasks.pairs import PAIR_ID_COLUMN, TASK_COLUMN, concatenate_tasks
from .account import judge_account
from .duplicates import duplicates, text_hashes
from .mistakes import mistakes_of, text_of
from .rules import trivial_rules
from .tokens import unknown_tokens
from .verdict import FATAL, TaskFigures, judge, judge_sizes


SAMPLE = 5000  # pairs of each task and split that are tokenised and read
_SPLITS = {"train": "training", "test": "held-out"}  # in messages
_SAME = (SAME_TEXT, SAME_TOKENS, SAME_AFTER_CUT)
_REPEATED = re.compile(r"(<[^<>\s]+>|\[[A-Z_]+\])(?:\s*\1){3,}")
_EXCERPT = 60  # characters of a prompt by which its pair can be found


@dataclasses.dataclass
class DataCheck:
    """What [`check_data`] found.

    Parameters:
        model, max_length, truncation_mode, seed, sample:
            What it was looked at with.
        tasks (`list[TaskFigures]`):
            The tasks, in the recipe's order.
        model_problem (`str`, *optional*):
            Why the model, the adapter and the training arguments do not go together.
    """

    model: str
    max_length: int | None
    truncation_mode: str
    seed: int
    sample: int | None
    tasks: list[TaskFigures]
    model_problem: str | None = None

    @property
    def trains(self) -> bool:
        """Whether every task will train."""
        return self.model_problem is None and all(figures.verdict != FATAL for figures in self.tasks)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON types."""
        result = dataclasses.asdict(self)
        for entry, figures in zip(result["tasks"], self.tasks, strict=True):
            entry["verdict"] = figures.verdict
        return result


def check_data(settings: RunSettings, show: int = 2, sample: int | None = SAMPLE) -> DataCheck:
    """Look at the pairs of every task of a recipe.

    Args:
        settings ([`RunSettings`]): The parsed recipe.
        show (`int`): How many pairs of each task to decode.
        sample (`int`, *optional*): Tokenise and read at most that many pairs of each task and split, drawn with the run's seed;
            `None` for all. Duplicates are looked for among all.

    Raises:
        AMAError: If there are no tasks, or the tokenizer cannot be read. What is wrong with a task is in the result.
    """
    recipe, inputs = settings.recipe, settings.inputs
    args = recipe.training_args
    if not recipe.task_args.tasks:
        raise no_tasks(recipe.task_args)
    processor, ready = inputs.processor, inputs.ready_pairs()
    checked, loaded = [], {}
    for task in recipe.task_args.tasks:
        figures = TaskFigures(task.task)
        checked.append(figures)
        # Without what the pipeline drops, to count it; and by itself, so that one bad task does not hide the others
        alone = dataclasses.replace(
            recipe.task_args, tasks=[task], drop_truncated=False, max_train_pairs=None, max_eval_pairs=None
        )
        try:
            found = read_tasks(alone, args.seed, None, ready)
        except AMAError as error:
            figures.add("fatal", "unreadable", str(error), "")
            continue
        except Exception as error:  # data of any shape, through code that expects pairs
            figures.add(
                "fatal",
                "unreadable",
                f"The rows cannot be read ({type(error).__name__}: {first_line(error)}).",
                "Give prompt, chosen and rejected of every row as strings, or of every row as lists of {role, content}.",
            )
            continue
        pairs = loaded[task.task] = found.pairs
        _look_at(figures, pairs, found.accounts[task.task], recipe, processor, show, sample)
        _check_specialist_length(figures, recipe, task)
    hashes = {task: {split: text_hashes(part) for split, part in pairs.items()} for task, pairs in loaded.items()}
    found = duplicates(hashes) if hashes else {}
    for figures in checked:
        figures.duplicates = found.get(figures.task, {})
        judge(figures, args.max_length, recipe.task_args.drop_truncated)
        judge_account(figures, args.max_length)
    judge_sizes(checked)
    _check_together(checked, loaded)
    for figures in checked:
        figures.problems.sort(key=lambda problem: ["fatal", "look", "note"].index(problem.level))
    data = DataCheck(recipe.model_name, args.max_length, args.truncation_mode, args.seed, sample, checked)
    if data.trains:
        data.model_problem = model_problem(recipe, inputs, loaded)
    return data


def _look_at(
    figures: TaskFigures,
    pairs: DatasetDict,
    accounts: dict[str, RowAccount],
    recipe: Recipe,
    processor: PreTrainedTokenizerBase | ProcessorMixin,
    show: int,
    sample: int | None,
) -> None:
    args, tokenizer = recipe.training_args, getattr(processor, "tokenizer", processor)
    tokens = _special_tokens(tokenizer)
    answers: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    for split, part in pairs.items():
        rows = np.arange(len(part))
        if sample is not None and len(part) > sample:
            rows = np.sort(np.random.default_rng(args.seed).choice(len(part), sample, replace=False))
        columns = [name for name in (*PAIR_COLUMNS, *TEMPLATE_COLUMNS) if name in part.column_names]
        read = list(part.select(rows).select_columns(columns))
        mistakes: Counter[str] = Counter()
        first: dict[str, tuple[int, str]] = {}
        for number, row in zip(rows.tolist(), read, strict=True):
            for kind in mistakes_of(row, tokens):
                mistakes[kind] += 1
                first.setdefault(kind, (number, " ".join(text_of(row["prompt"]).split())[:_EXCERPT]))
        answers[split] = [(text_of(row["chosen"]), text_of(row["rejected"])) for row in read]
        figures.splits[split] = {
            "pairs": len(part),
            "rows": accounts[split].to_dict(),
            "looked_at": len(read),
            "mistakes": {kind: (count, *first[kind]) for kind, count in mistakes.items()},
        }
        try:
            tokenised = tokenise(part.select(rows), processor, args, rows.tolist())
        except AMAError as error:
            figures.add("fatal", "template", f"Of the {_SPLITS[split]} pairs: {error}", "")
            continue
        limit = recipe.task_args.max_train_pairs if split == "train" else recipe.task_args.max_eval_pairs
        figures.splits[split] |= _lengths(tokenised, args.max_length)
        drops = args.truncation_mode == "keep_start" and not has_images(part)
        same = equal_answers(tokenised, read, args)
        figures.splits[split]["left"] = _left(tokenised, same, len(part), recipe, limit, drops)
        figures.splits[split]["unknown_tokens"] = unknown_tokens(tokenised, read, tokenizer)
        if has_images(part) and not recipe.task_args.drop_truncated:
            _check_image_room(figures, split, token_counts(tokenised)[:, 0], args.max_length)
        if split == "train" and show:
            some = np.random.default_rng(args.seed).permutation(len(read))[:show]
            figures.shown = [
                _shown(tokenised[row], int(rows[row]), tokenizer, args, recipe.task_args.drop_truncated, drops)
                for row in np.sort(some).tolist()
            ]
    figures.rules = trivial_rules(answers["train"], answers["test"])


def _check_image_room(figures: TaskFigures, split: str, prompts: np.ndarray, max_length: int | None) -> None:
    count = 0 if max_length is None else int((prompts >= max_length).sum())
    if count:
        figures.add(
            "fatal", "images_fill_max_length",
            f"Of {len(prompts)} {_SPLITS[split]} pairs {count} have a prompt that fills max_length ({max_length}) with its images, and "
            "DPOTrainer does not drop such pairs.",
            f"Raise max_length (the longest prompt has {int(prompts.max())} tokens), or set drop_truncated: true.",
        )  # fmt: skip


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    # A tokenizer may use a word or a mark of ordinary text as one of them
    return sorted(
        token for token in tokens | set(tokenizer.all_special_tokens) if len(token) > 2 and not token.isalnum()
    )


def _lengths(tokenised: Dataset, max_length: int | None) -> dict[str, Any]:
    prompt, chosen, rejected = token_counts(tokenised).T
    whole = prompt + np.maximum(chosen, rejected)
    return {
        "lengths": {
            name: {
                "median": float(np.median(counts)),
                "90%": float(np.quantile(counts, 0.9)),
                "max": int(counts.max()),
            }
            for name, counts in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected), ("pair", whole))
        },
        "over_max_length": 0.0 if max_length is None else float((whole > max_length).mean()),
        "shortest_prompt": int(prompt.min()),
        "holds_95_percent": int(np.ceil(np.quantile(whole, 0.95))),
    }


def _left(
    tokenised: Dataset, same: list[str | None], total: int, recipe: Recipe, limit: int | None, drops: bool
) -> dict[str, Any]:
    """What the pipeline drops, in its order, and how much of the rest teaches nothing, as both answers are the same.

    Counted on the sample and scaled if there are more pairs than it holds. `drops` says whether DPOTrainer drops pairs whose
    prompt fills `max_length`.
    """
    args = recipe.training_args
    prompt, chosen, rejected = token_counts(tokenised).T
    rows, scale = np.arange(len(prompt)), total / len(prompt)
    dropped = {"drop_truncated": 0, "max_pairs": 0, "prompt_fills_max_length": 0}
    if recipe.task_args.drop_truncated and args.max_length is not None:
        rows = rows[(prompt + np.maximum(chosen, rejected))[rows] <= args.max_length]
        dropped["drop_truncated"] = total - round(len(rows) * scale)
    kept = total - dropped["drop_truncated"]
    if limit is not None and kept > limit:
        if scale == 1:  # the pairs themselves, as `load_tasks` draws them
            rows = np.array(Dataset.from_dict({"row": rows}).shuffle(seed=args.seed).select(range(limit))["row"])
        dropped["max_pairs"], kept = kept - limit, limit
    if args.max_length is not None and drops and len(rows):
        fills = prompt[rows] >= args.max_length
        dropped["prompt_fills_max_length"] = round(kept * float(fills.mean()))
        rows = rows[~fills]
    left = kept - dropped["prompt_fills_max_length"]
    kinds = Counter(same[row] for row in rows.tolist())
    return {
        **dropped,
        "left": left,
        **{kind: round(kinds[kind] * left / len(rows)) if len(rows) else 0 for kind in _SAME},
        "teaches_nothing": left > 0 and not kinds[None],
        "estimated": scale != 1,
    }


def _shown(
    row: dict[str, Any],
    number: int,
    tokenizer: PreTrainedTokenizerBase,
    args: AMAConfig,
    drop_truncated: bool,
    drops: bool,
) -> dict[str, Any]:
    """A pair as the model sees it: the text of the tokens that are left, and how many are cut."""
    limit, prompt = args.max_length, row["prompt_ids"]
    shown: dict[str, Any] = {"row": number, "tokens": {"prompt": len(prompt)}, "cut": {}}
    shown["prompt"] = _REPEATED.sub(_times, tokenizer.decode(prompt))
    for side in ("chosen", "rejected"):
        ids = row[f"{side}_ids"]
        shown["tokens"][side] = len(ids)
        cut = max(0, len(prompt) + len(ids) - limit) if limit is not None else 0
        if args.truncation_mode == "keep_start":
            here = min(cut, len(ids))
            ids = ids[: len(ids) - here]
        else:  # first the prompt goes, from its beginning
            here = max(0, cut - len(prompt))
            ids = ids[here:]
            shown["cut"][f"prompt with {side}"] = cut - here
        shown[side] = tokenizer.decode(ids)
        shown["cut"][side] = here
    shown["dropped"] = None
    if drop_truncated and any(shown["cut"].values()):
        shown["dropped"] = "drop_truncated"
    elif limit is not None and drops and len(prompt) >= limit:
        shown["dropped"] = "prompt_fills_max_length"
    return shown


def _times(found: re.Match) -> str:
    """An image is the same token hundreds of times."""
    return f"{found[1]}×{found[0].count(found[1])}"


def _check_specialist_length(figures: TaskFigures, recipe: Recipe, task: Any) -> None:
    """`check_recipe`'s rule: a specialist whose own `max_length` every prompt fills cannot be trained."""
    args, lengths = recipe.specialist_arguments(task), figures.splits["train"].get("lengths")
    if lengths and args.max_length is not None and args.truncation_mode == "keep_start":
        shortest = figures.splits["train"]["shortest_prompt"]
        if shortest >= args.max_length != recipe.training_args.max_length:
            figures.add(
                "fatal", "specialist_max_length",
                f"The prompts of all pairs fill the max_length ({args.max_length}) of specialist_args alone.",
                "Raise that max_length, or leave it out of specialist_args.",
            )  # fmt: skip


def _check_together(checked: list[TaskFigures], loaded: dict[str, DatasetDict]) -> None:
    """Whether the tasks can be concatenated: the pipeline refuses columns of different types."""
    for split in ("train", "test"):
        parts = {
            task: pairs[split].select([0]).remove_columns([TASK_COLUMN, PAIR_ID_COLUMN])
            for task, pairs in loaded.items()
            if split in pairs
        }
        sound = [figures.task for figures in checked if figures.task in parts and figures.verdict != FATAL]
        messages = next((task for task in sound if not isinstance(parts[task].features["chosen"], Value)), None)
        if messages is not None and sound[0] != messages:
            sound = [messages, *(task for task in sound if task != messages)]  # plain text is what can be mended
        for figures in checked:
            if figures.task in sound[1:]:
                try:
                    concatenate_tasks({task: parts[task] for task in (sound[0], figures.task)})
                except AMAError as error:
                    found, _, fix = str(error).partition(". ")
                    figures.add("fatal", "other_columns", f"Of the {_SPLITS[split]} pairs: {found}.", fix)
