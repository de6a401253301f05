"""Computes reference losses: one sweep over a task's pairs under base and specialist, and a start again where it stopped."""

import numpy as np
from accelerate import PartialState
from accelerate.utils import release_memory, tqdm
from datasets import Dataset, concatenate_datasets
from tqdm.std import tqdm as ProgressBar

from ..common.arrays import numpy_column, with_columns
from ..common.errors import AMAError
from ..common.processes import from_main
from ..dpo.pair_trainer import ScoringTrainer
from ..dpo.scored_rows import count_tokens, scored_columns, unit_of
from ..dpo.scoring import score_reference_and_specialist
from ..recipe.fingerprint import reference_fingerprint
from ..recipe.settings import RunSettings
from ..reference_losses.columns import LOGP_COLUMNS, REFERENCE_COLUMNS, SPECIALIST_COLUMNS, TOKEN_COLUMNS
from ..reference_losses.dataset import ReferenceLosses
from ..reference_losses.files import save_task
from ..reference_losses.shards import LossShards, remove_shards
from ..tasks.forms import EXTRA_COLUMNS, PAIR_COLUMNS
from ..tasks.pairs import PAIR_ID_COLUMN, TASK_COLUMN
from .run_losses import reference_losses_done, reference_losses_of


def compute_reference_losses(settings: RunSettings) -> ReferenceLosses:
    """Score every pair of the chosen tasks with the base and its task's specialist, and save each task when it is complete.

    One base model is in memory; specialists are adapters switched on it. What is there already, tasks or pairs of an
    unfinished one, is not scored again.

    Returns:
        [`ReferenceLosses`] of these tasks with `train` and, if there are held-out pairs, `test`.

    Raises:
        AMAError: If a specialist is missing or of another base model, or losses that are there were made by other settings.
    """
    recipe, inputs = settings.recipe, settings.inputs
    remaining = from_main(lambda: [task for task in recipe.chosen_tasks if not reference_losses_done(settings, task)])
    if PartialState().is_main_process:
        for task in set(recipe.chosen_tasks) - set(remaining):  # a run may have been stopped between the two
            remove_shards(settings.folder.shards(task))
    if remaining:
        numbers = [recipe.task_names.index(task) for task in remaining]
        parts = {
            split: part.filter(lambda batch: [task in numbers for task in batch[TASK_COLUMN]], batched=True)
            for split, part in inputs.data.items()
        }
        parts = {split: part for split, part in parts.items() if len(part)}
        trainer = ScoringTrainer(
            model=recipe.model_name,
            args=recipe.scoring_arguments(inputs.has_images),
            train_dataset=parts["train"],
            eval_dataset=parts.get("test"),
            processing_class=inputs.processing_class,
            quantization_config=recipe.quantization_config(),
            peft_config=inputs.peft_config(),
        )
        prepared = {"train": trainer.train_dataset, "test": trainer.eval_dataset}
        prepared = {split: prepared[split] for split in parts}
        with tqdm(
            total=2 * sum(count_tokens(part, trainer.args.max_length) for part in prepared.values()),
            desc=f"Reference losses of {len(remaining)} tasks",
            disable=trainer.args.disable_tqdm or len(remaining) == 1,
            unit=unit_of(prepared["train"]),
            unit_scale=True,
        ) as overall:
            for task in remaining:
                _score_task(settings, trainer, task, prepared, overall)
        del trainer
        release_memory()
    return ReferenceLosses(reference_losses_of(settings, recipe.chosen_tasks))


def _score_task(
    settings: RunSettings, trainer: ScoringTrainer, task: str, prepared: dict[str, Dataset], overall: ProgressBar
) -> None:
    number, shards = settings.recipe.task_names.index(task), settings.folder.shards(task)
    splits = {
        split: part.select(np.flatnonzero(numpy_column(part, TASK_COLUMN) == number))
        for split, part in prepared.items()
    }
    splits = {split: part for split, part in splits.items() if len(part)}
    given = {split: settings.inputs.pairs_of(task, split) for split in settings.inputs.data}
    kept = {split: set(part[PAIR_ID_COLUMN]) for split, part in splits.items()}
    dropped = {
        split: sorted(set(part[PAIR_ID_COLUMN]) - kept.get(split, set()))
        for split, part in given.items()
        if part is not None
    }
    fingerprint = reference_fingerprint(settings, task)
    needed = (*scored_columns(prepared["train"]), PAIR_ID_COLUMN)
    pairs = concatenate_datasets([part.select_columns(list(needed)) for part in splits.values()])
    scores = score_reference_and_specialist(
        trainer,
        f"the specialist of task '{task}'",
        settings.specialist_source(task),
        pairs,
        f"Reference losses, {task}",
        LossShards(shards, fingerprint, pairs[PAIR_ID_COLUMN][:], trainer.accelerator.process_index),
        overall,
    )
    for who, columns in (
        (settings.recipe.model_name, REFERENCE_COLUMNS),
        (settings.specialist_source(task), SPECIALIST_COLUMNS),
    ):
        bad = ~np.isfinite([scores[column] for column in columns]).all(axis=0)
        if bad.any():
            raise AMAError(
                f"'{who}' gives no finite log-probs of {bad.sum()} of {len(bad)} pairs of task '{task}', the first with pair_id "
                f"{pairs[int(bad.argmax())][PAIR_ID_COLUMN]}. If they are all, train it again with a lower learning_rate; if they are few, "
                "look at those pairs, or set dtype to float32."
            )

    def save() -> None:
        tables, start, with_text = {}, 0, settings.recipe.pipeline_args.include_text
        for split, part in splits.items():
            columns = {name: values[start : start + len(part)] for name, values in scores.items()}
            tables[split] = _table(task, given[split], part[PAIR_ID_COLUMN][:], columns, with_text)
            start += len(part)
        save_task(settings.folder.losses, task, tables, fingerprint, dropped, number)
        remove_shards(shards)

    from_main(save)


def _table(task: str, given: Dataset, ids: list[str], scores: dict[str, np.ndarray], with_text: bool) -> Dataset:
    """The rows of a split that are saved.

    Their texts are the loaded pairs', by id: `DPOTrainer` prepares texts of its own, which end with a special token.
    """
    texts = [name for name in (*PAIR_COLUMNS, *EXTRA_COLUMNS) if name in given.column_names]
    kept = [PAIR_ID_COLUMN, *(texts if with_text else ())]
    row_of = {name: row for row, name in enumerate(given[PAIR_ID_COLUMN][:])}
    table = given.select([row_of[name] for name in ids]).select_columns(kept).flatten_indices()
    scored = {name: scores[name] for name in (*LOGP_COLUMNS, *TOKEN_COLUMNS)}
    table = with_columns(table, {TASK_COLUMN: [task] * len(table), **scored})
    return table.select_columns([TASK_COLUMN, *kept, *LOGP_COLUMNS, *TOKEN_COLUMNS])
