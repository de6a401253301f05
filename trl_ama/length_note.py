"""What `max_length` does to a run's pairs, said before anything is trained on them."""

import numpy as np
from datasets import Dataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from .errors import AMAError
from .pair_images import has_images
from .pair_tokens import token_counts, tokenise
from .run_settings import RunSettings


_SAMPLE = 2000  # pairs of a run that are tokenised for this: about two seconds
_FEWEST = 10  # of a task


def length_lines(settings: RunSettings) -> list[str]:
    """A line for each chosen task some of whose training pairs `max_length` drops or cuts.

    What `drop_truncated` drops is counted. The rest is looked for in a sample, the first pairs of each task, so that a run of a
    million pairs begins as soon as one of a thousand; `trl ama-check` reads more, and held-out pairs too.

    Every process has to call this at the same time: DPOTrainer's tokenisation waits for the main process.

    Args:
        settings ([`RunSettings`]): The run.

    Raises:
        AMAError: If a pair cannot be tokenised.
    """
    limit = settings.training_args.max_length
    if limit is None:
        return []
    lines = []
    for task in settings.chosen_tasks:
        pairs = settings.pairs_of(task, "train")
        found = []
        dropped = settings.dropped_truncated.get(task, {})
        if dropped:
            counts = " and ".join(f"{count} of {split}" for split, count in dropped.items())
            found.append(f"{counts} dropped")
        else:
            most = _SAMPLE // (10 if has_images(pairs) else 1)  # which take more than ten times as long
            looked_at = min(len(pairs), max(_FEWEST, most // len(settings.chosen_tasks)))
            prompt, chosen, rejected = _counts(settings, task, pairs.select(range(looked_at)))
            # DPOTrainer drops a pair whose prompt leaves no room, if it cuts at the end (with images, `check_images` refuses it)
            filled = (prompt >= limit) & (settings.training_args.truncation_mode == "keep_start")
            cut = ~filled & (prompt + chosen.clip(min=rejected) > limit)
            scale = len(pairs) / looked_at
            about = "" if scale == 1 else "about "
            for count, what in ((cut.sum(), "cut"), (filled.sum(), "dropped, as their prompts fill it")):
                if count:
                    found.append(f"{about}{round(int(count) * scale)} of {len(pairs)} {what}")
        if found:
            lines.append(f"  over max_length   {task:<14} {'; '.join(found)} (max_length is {limit})")
    return lines


def _counts(settings: RunSettings, task: str, pairs: Dataset) -> np.ndarray:
    """Tokens of the pairs' prompts, chosen and rejected answers, without a bar for each of a thousand tasks. # (3, N)"""
    quiet = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        return token_counts(tokenise(pairs, settings.processor, settings)).T
    except AMAError as error:
        raise AMAError(f"Task '{task}', training pairs: {error}") from error
    finally:
        if not quiet:
            enable_progress_bars()
