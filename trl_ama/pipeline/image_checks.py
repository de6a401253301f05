"""What a run on pairs with images must not ask for, said before anything is trained: `DPOTrainer` refuses it late, or not at all."""

from collections.abc import Callable
from functools import partial

from datasets import Dataset

from ..common.errors import AMAError
from ..common.processes import from_main
from ..dpo.config import AMAConfig
from ..recipe.inputs import RunInputs
from ..recipe.recipe import Recipe
from ..tasks.image_tokens import check_takes_images
from ..tasks.loading import prompt_fits_into


_SAMPLE = (
    2000  # pairs of each task and split: images take their time. Others are found when their log-probs are computed
)


def check_images(recipe: Recipe, inputs: RunInputs) -> None:
    """Raise an `AMAError` if the run's pairs have images, and its model or its arguments cannot take them."""
    if not inputs.has_images:
        return
    check_takes_images(inputs.processor)
    _check_arguments(recipe.training_args, "")
    for task in recipe.task_args.tasks:
        args = recipe.specialist_arguments(task)
        _check_arguments(args, f" (specialist_args of task '{task.task}')")
        limits = {args.max_length, recipe.training_args.max_length} - {None}
        if not limits or (recipe.task_args.drop_truncated and min(limits) == recipe.training_args.max_length):
            continue
        # Unlike those of plain text, DPOTrainer does not drop them: the images' tokens would be cut, or all of an answer
        fits = prompt_fits_into(inputs.processor, min(limits))
        for split in inputs.data:
            pairs = inputs.pairs_of(task.task, split)
            if pairs is None:
                continue
            if len(pairs) > _SAMPLE:
                pairs = pairs.shuffle(seed=recipe.training_args.seed).select(range(_SAMPLE))
            count = from_main(partial(_count_misfits, pairs, fits))
            if count:
                raise AMAError(
                    f"The prompts of {count} of {len(pairs)} {split} pairs that were looked at of task '{task.task}' fill max_length ({min(limits)}) with their "
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
