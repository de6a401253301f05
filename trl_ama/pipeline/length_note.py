"""What `max_length` and the tokens do to a run's pairs, said before anything is trained on them."""

import numpy as np
from datasets import Dataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..common.errors import AMAError
from ..dpo.config import AMAConfig
from ..dpo.tokens import equal_answers, token_counts, tokenise
from ..recipe.inputs import RunInputs
from ..recipe.recipe import Recipe
from ..tasks.images import has_images


_SAMPLE = 2000  # pairs of a run that are tokenised for this: about two seconds
_FEWEST = 10  # of a task


def length_lines(recipe: Recipe, inputs: RunInputs) -> list[str]:
    """A line for each chosen task some of whose training pairs `max_length` drops or cuts, or have answers that are the same tokens.

    What `drop_truncated` drops is counted. The rest is looked for in a sample, the first pairs of each task, so that a run of a
    million pairs begins as soon as one of a thousand; `trl ama-check` reads more, and held-out pairs too.

    Every process has to call this at the same time: DPOTrainer's tokenisation waits for the main process.

    Args:
        recipe ([`Recipe`]): What the run is told.
        inputs ([`RunInputs`]): What it reads.

    Raises:
        AMAError: If a pair cannot be tokenised.
    """
    args = recipe.training_args
    limit = args.max_length
    lines = []
    for task in recipe.chosen_tasks:
        pairs = inputs.pairs_of(task, "train")
        most = _SAMPLE // (10 if has_images(pairs) else 1)  # which take more than ten times as long
        looked_at = min(len(pairs), max(_FEWEST, most // len(recipe.chosen_tasks)))
        sample = pairs.select(range(looked_at))
        tokenised = _tokenised(sample, task, inputs.processor, args)
        filled = np.zeros(looked_at, dtype=bool)
        dropped = inputs.dropped_truncated.get(task, {})
        if limit is not None:
            prompt, chosen, rejected = token_counts(tokenised).T
            # DPOTrainer drops a pair whose prompt leaves no room, if it cuts at the end (with images, `check_images` refuses it)
            filled = (prompt >= limit) & (args.truncation_mode == "keep_start")
            cut = ~filled & (prompt + chosen.clip(min=rejected) > limit)
            found = [f"{_of_all(cut.sum(), looked_at, len(pairs))} cut"] if cut.any() else []
            if filled.any():
                found.append(f"{_of_all(filled.sum(), looked_at, len(pairs))} dropped, as their prompts fill it")
            if dropped:
                found = [" and ".join(f"{count} of {split}" for split, count in dropped.items()) + " dropped"]
            if found:
                lines.append(f"  over max_length   {task:<14} {'; '.join(found)} (max_length is {limit})")
        kinds = equal_answers(tokenised, sample.select_columns(["chosen", "rejected"]), args)
        same = sum(kind is not None for kind, gone in zip(kinds, filled, strict=True) if not gone)
        if same:
            count = _of_all(same, looked_at, len(pairs))
            lines.append(
                f"  no gradient       {task:<14} {count} pairs: both answers are the same to the model (see trl ama-check)"
            )
    return lines


def _of_all(count: int, looked_at: int, total: int) -> str:
    return f"{'' if looked_at == total else 'about '}{round(int(count) * total / looked_at)} of {total}"


def _tokenised(
    pairs: Dataset, task: str, processor: PreTrainedTokenizerBase | ProcessorMixin, args: AMAConfig
) -> Dataset:
    """The pairs as `DPOTrainer` prepares them, without a bar for each of a thousand tasks."""
    quiet = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        return tokenise(pairs, processor, args)
    except AMAError as error:
        raise AMAError(f"Task '{task}', training pairs: {error}") from error
    finally:
        if not quiet:
            enable_progress_bars()
