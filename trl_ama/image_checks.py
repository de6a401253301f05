"""What a run on pairs with images must not ask for, said before anything is trained: `DPOTrainer` refuses it late, or not at all."""

from collections.abc import Callable
from functools import partial

from datasets import Dataset

from .ama_config import AMAConfig
from .errors import AMAError
from .image_tokens import check_takes_images
from .pair_images import has_images
from .processes import from_main
from .run_settings import RunSettings
from .task_loading import prompt_fits_into


def check_images(settings: RunSettings) -> None:
    """Raise an `AMAError` if the run's pairs have images, and its model or its arguments cannot take them."""
    if not any(map(has_images, settings.data.values())):
        return
    check_takes_images(settings.processor)
    _check_arguments(settings.training_args, "")
    for task in settings.task_args.tasks:
        args = settings.specialist_arguments(task)
        _check_arguments(args, f" (specialist_args of task '{task.task}')")
        limits = {args.max_length, settings.training_args.max_length} - {None}
        if not limits or (settings.task_args.drop_truncated and min(limits) == settings.training_args.max_length):
            continue
        # Unlike those of plain text, DPOTrainer does not drop them: the images' tokens would be cut, or all of an answer
        fits = prompt_fits_into(settings.processor, min(limits))
        for split in settings.data:
            pairs = settings.pairs_of(task.task, split)
            count = 0 if pairs is None else from_main(partial(_count_misfits, pairs, fits))
            if count:
                raise AMAError(
                    f"The prompts of {count} of {len(pairs)} {split} pairs of task '{task.task}' fill max_length ({min(limits)}) with their "
                    "images, and DPOTrainer does not drop such pairs. Raise max_length, or set `drop_truncated: true`."
                )


def _count_misfits(pairs: Dataset, fits: Callable[[dict], bool]) -> int:
    return sum(not fits(row) for row in pairs)


def _check_arguments(args: AMAConfig, where: str) -> None:
    if args.truncation_mode == "keep_end" and args.max_length is not None:
        raise AMAError(
            f"truncation_mode 'keep_end'{where} would cut images, which are at the beginning. Use 'keep_start', or set max_length to null."
        )
    if args.precompute_ref_log_probs:
        raise AMAError(
            f"precompute_ref_log_probs{where} is not for pairs with images (DPOTrainer refuses it). Leave it out: the generalist's "
            "come with its reference losses anyway."
        )
    if args.pad_to_multiple_of is not None:
        raise AMAError(
            f"pad_to_multiple_of{where} is not for pairs with images (DPOTrainer's collator refuses it). Leave it out."
        )
