"""What must fit together before an `AMATrainer` loads a model."""

import os
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from trl import DPOConfig

from ..common.arrays import list_lengths, numpy_column
from ..common.errors import AMAError, nearest
from ..mixing import MixingStrategy
from ..reference_losses.columns import REFERENCE_COLUMNS, SPECIALIST_COLUMNS, TOKEN_COLUMNS, has_columns
from ..sampling.sampler import count_tasks
from ..tasks.held_out import eval_parts
from ..tasks.pairs import TASK_COLUMN
from .config import AMAConfig
from .losses import check_loss_types


logger = get_logger(__name__)


def check_config(args: Any) -> None:
    """Raise an `AMAError` unless `args` is an `AMAConfig`."""
    if not isinstance(args, AMAConfig):
        raise AMAError(
            f"AMATrainer takes an AMAConfig as `args`, got {type(args).__name__}. Replace `{DPOConfig.__name__}(…)` by "
            "`AMAConfig(…)`: it has every field of it."
        )


def check_train_dataset(train_dataset: Any) -> None:
    """Raise an `AMAError` unless there are pairs that can be drawn by task."""
    if train_dataset is None:
        raise AMAError("`train_dataset` is required: give AMATrainer preference pairs with a `task` column, got None.")
    if not isinstance(train_dataset, (Dataset, IterableDataset, dict)):
        raise AMAError(
            f"train_dataset must be a datasets.Dataset, got {type(train_dataset).__name__}. See Dataset.from_list, and for streams "
            "give a dict of tasks."
        )
    if isinstance(train_dataset, (Dataset, dict)) and len(train_dataset) == 0:
        raise AMAError("train_dataset has no rows. Give it preference pairs with a `task` column.")


def check_specialists(specialists: dict[str, Any] | None, task_names: list[str]) -> dict[str, Any] | None:
    """The specialists, one per task; `None` if there are none at all.

    Raises:
        AMAError: If a task has none while another has, or one is for an unknown task.
    """
    if not specialists:
        return None
    if not isinstance(specialists, dict):
        raise AMAError(
            f"specialists maps each task to its adapter, got {specialists!r:.80}. Give {{task: folder or Hub id}}."
        )
    for task, source in specialists.items():
        if not isinstance(source, (str, os.PathLike, torch.nn.Module)):
            raise AMAError(
                f"The specialist of task {task!r} must be a folder, a Hub id or a model, got {source!r:.80}. Leave `specialists` out if there "
                "are none."
            )
    unknown = [task for task in specialists if task not in task_names]
    if unknown:
        raise AMAError(
            f"There is a specialist for '{unknown[0]}', but the training tasks are {task_names}."
            f"{nearest(unknown[0], task_names)}"
        )
    missing = [task for task in task_names if task not in specialists]
    if missing:
        raise AMAError(
            f"Task '{missing[0]}' has no specialist; there are specialists for {sorted(specialists)}. Train one with "
            "`trl ama-specialists --config …`, or add it to `specialists`."
        )
    return {task: os.fspath(one) if isinstance(one, os.PathLike) else one for task, one in specialists.items()}


def check_columns(train_dataset: Dataset | Any, eval_dataset: Any, ref_model: Any) -> tuple[bool, bool]:
    """Whether the training pairs carry reference log-probs, and specialists' log-probs.

    Raises:
        AMAError: If columns are incomplete or not finite, contradict each other or `ref_model`.
    """
    has_reference = has_columns(train_dataset, REFERENCE_COLUMNS, "train_dataset")
    has_specialist = has_columns(train_dataset, SPECIALIST_COLUMNS, "train_dataset")
    for role, part in eval_parts(eval_dataset).items():
        has_columns(part, REFERENCE_COLUMNS, role)
        has_columns(part, SPECIALIST_COLUMNS, role)
    if has_specialist and not has_reference:
        raise AMAError(
            f"train_dataset has {list(SPECIALIST_COLUMNS)} but lacks {list(REFERENCE_COLUMNS)}, and a specialist's loss "
            "depends on both. `trl ama-losses` computes all four."
        )
    if has_reference and ref_model is not None:
        raise AMAError(
            f"train_dataset has the columns {list(REFERENCE_COLUMNS)} and `ref_model` was passed too. Pass one of them."
        )
    return has_reference, has_specialist


def check_no_task_lost(before: Dataset, after: Dataset, task_names: list[str], max_length: int | None) -> None:
    """Raise an `AMAError` if `DPOTrainer` dropped every pair of a task because its prompts fill `max_length`."""
    if TASK_COLUMN in before.column_names:
        counts, left = (count_tasks(numpy_column(data, TASK_COLUMN), len(task_names)) for data in (before, after))
    else:
        counts, left = [len(before)], [len(after)]
    for name, count, rest in zip(task_names, counts, left, strict=True):
        if rest == 0:
            whose = f" of task '{name}'" if TASK_COLUMN in before.column_names else ""
            raise AMAError(
                f"All {count} pairs{whose} were dropped, because their prompts alone fill max_length "
                f"({max_length}). Raise max_length, or remove the task."
            )


def kept_tokens(prompts: Any, answers: Any, max_length: int | None, truncation_mode: str) -> Any:
    """How many tokens of answers truncation leaves, given numbers of tokens: arrays, or one each. # (N,)"""
    if max_length is None:
        return answers
    room = max_length - prompts if truncation_mode == "keep_start" else max_length
    return np.minimum(answers, np.maximum(room, 0))


def check_token_counts(dataset: Dataset, role: str, max_length: int | None, truncation_mode: str) -> None:
    """Raise an `AMAError` if log-probs in the data were summed over other numbers of tokens than the answers have here."""
    if any(
        column not in dataset.column_names for column in (*TOKEN_COLUMNS, "prompt_ids", "chosen_ids", "rejected_ids")
    ):
        return
    prompts = list_lengths(dataset, "prompt_ids")
    for column, ids in zip(TOKEN_COLUMNS, ("chosen_ids", "rejected_ids"), strict=True):
        ours = kept_tokens(prompts, list_lengths(dataset, ids), max_length, truncation_mode)
        theirs = numpy_column(dataset, column)
        other = np.flatnonzero(ours != theirs)
        if len(other):
            row = int(other[0])
            raise AMAError(
                f"The log-probs in {role} were summed over other tokens: '{column}' differs from this run's tokenisation in "
                f"{len(other)} of {len(ours)} pairs (row {row}: {theirs[row]} against {ours[row]}). Use the tokenizer, chat "
                "template and max_length that the reference losses were made with, or compute them again with `trl ama-losses`."
            )


def check_arguments(args: AMAConfig, strategy: MixingStrategy, has_reference_losses: bool) -> None:
    """Raise an `AMAError` for arguments of `DPOTrainer` or the Trainer that contradict the strategy."""
    if strategy.uses_own_sampler and args.train_sampling_strategy != "random":
        raise AMAError(
            f"train_sampling_strategy='{args.train_sampling_strategy}' and mixing='{args.mixing}' both decide which pairs "
            "come next. Leave train_sampling_strategy at 'random', or use mixing='proportional'."
        )
    check_processes(args)
    if has_reference_losses or not descends_trl_loss(strategy):
        check_loss_types(args.loss_type, args.label_smoothing)
    if args.use_weighting and not descends_trl_loss(strategy):
        raise AMAError(
            "use_weighting (WPO) weighs pairs by the policy's own probabilities, and excess losses over a specialist cannot "
            f"be compared with that. Turn it off, or use mixing='proportional' instead of '{args.mixing}'."
        )
    if args.sync_ref_model and has_reference_losses:
        raise AMAError(
            "sync_ref_model moves the reference policy during training, and reference losses hold for a fixed one. Turn it "
            "off, or train without specialists."
        )


def check_processes(args: AMAConfig) -> None:
    """Raise an `AMAError` for ways to share batches among processes that are not one micro-batch for each."""
    if args.world_size == 1:
        _warn_of_one_process()
        return
    for name, needed in (("split_batches", (False,)), ("dispatch_batches", (None, False)), ("even_batches", (True,))):
        value = getattr(args.accelerator_config, name)
        if value not in needed:
            raise AMAError(
                f"accelerator_config sets {name}={value}, but the mixture counts on micro-batches of "
                f"per_device_train_batch_size for each of the {args.world_size} processes. Leave it at {needed[-1]}."
            )
    parallelism = args.parallelism_config
    if parallelism is not None and parallelism.non_data_parallel_size > 1:
        raise AMAError(
            "parallelism_config gives several processes the same pairs (tensor, context or sequence parallelism), and the "
            "mixture would count them more than once. Share the model by FSDP or DeepSpeed ZeRO instead."
        )


def _warn_of_one_process() -> None:
    """Warn if `accelerate launch` was asked for several processes and started one, which it does on a CPU."""
    # It then sets where the first process is to be found, and neither a world size nor a rank, which its other launchers set
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("MASTER_ADDR") == "127.0.0.1"
    if launched and "WORLD_SIZE" not in os.environ:
        logger.warning_once(
            "`accelerate launch` was asked for several processes and has started one, as it does without several GPUs: a step is "
            "of one process's pairs. On a CPU, launch them with `torchrun --nproc-per-node` or MPI, or leave `num_processes` out."
        )


def check_best_metric(
    args: AMAConfig, strategy: MixingStrategy, eval_dataset: Any, has_specialist: bool, will_score: bool
) -> None:
    """Raise an `AMAError` if `metric_for_best_model` is a figure over tasks that evaluation will not give.

    Args:
        args, strategy: As in `check_arguments`.
        eval_dataset: The held-out pairs, or a dict of them (whose figures have names that only the user knows).
        has_specialist (`bool`): Whether the training pairs carry the specialists' log-probs.
        will_score (`bool`): Whether specialists are given, who will score the held-out pairs.
    """
    metric = (args.metric_for_best_model or "").removeprefix("eval_")
    if metric not in (f"{kind}_{name}" for kind in ("worst", "mean") for name in ("excess", "accuracy", "margin")):
        return
    ours = f"metric_for_best_model='{args.metric_for_best_model}'"
    if metric.endswith("excess") and not (has_specialist or will_score) and strategy.objective == "loss":
        raise AMAError(
            f"{ours} needs reference losses, and the dataset has none. Compute them with `trl ama-losses`, or choose "
            "'worst_accuracy'."
        )
    if not isinstance(eval_dataset, Dataset):
        return
    columns = eval_dataset.column_names
    if TASK_COLUMN not in columns:
        raise AMAError(f"{ours} needs held-out pairs with a 'task' column; eval_dataset has {columns}. Add it.")
    if metric.endswith("excess") and has_specialist and SPECIALIST_COLUMNS[0] not in columns:
        raise AMAError(
            f"{ours} needs {list(SPECIALIST_COLUMNS)} of the held-out pairs too; eval_dataset has {columns}. "
            "`trl ama-losses` computes them, or choose 'worst_accuracy'."
        )


def descends_trl_loss(strategy: MixingStrategy) -> bool:
    """Whether TRL's own batch mean is what the θ-step descends: no excess, and all weights 1."""
    return strategy.objective == "loss" and bool((strategy.loss_weights() == 1).all())
