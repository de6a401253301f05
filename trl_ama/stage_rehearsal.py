"""Rehearses every stage of a run that trains, before the first of them does: see `rehearsal.py` for how."""

import json
from collections.abc import Sequence

from datasets import Dataset
from transformers import PreTrainedModel

from .ama_config import AMAConfig
from .fingerprint import tokenizer_identity
from .pair_tokens import tokenise
from .rehearsal import check_batches, empty_policy, rehearse
from .run_settings import RunSettings
from .tasks import TASK_COLUMN
from .token_limits import TokenLimits


_PAIRS = 2  # of a stage's own that are tokenised; what is looked at is the settings
# What differs between stages, and nobody below AMATrainer looks at
_OWN = ("output_dir", "run_name", "logging_dir", "seed", "data_seed", "max_steps", "num_train_epochs", "hub_model_id", "push_to_hub",
        "mixing", "mixing_lr", "smoothing", "excess_clip", "sampling", "specialists", "streaming_buffer", "save_strategy")  # fmt: skip
_passed: set[str] = set()  # by this process


def rehearse_stages(settings: RunSettings, stages: Sequence[str], runs_batch: bool = False) -> None:
    """Rehearse the specialists and generalists that a run is going to train; equal ones once in a process.

    Args:
        settings ([`RunSettings`]): The run.
        stages (`Sequence[str]`): Its stages.
        runs_batch (`bool`): Whether a batch is run, too, which takes seconds for a model of many layers.

    Raises:
        AMAError: If one of them could not be trained.
    """
    planned = _stages(settings, stages)
    for what, tasks, args in planned:
        parts = [settings.pairs_of(task, "train") for task in tasks]
        check_batches(what, args, sum(map(len, parts)), parts[0].column_names)
        if args.fsdp or args.deepspeed or {"image", "images"} & set(parts[0].column_names):
            continue
        rows = parts[0].select(range(min(_PAIRS, len(parts[0])))).remove_columns(TASK_COLUMN)
        key = _key(settings, args, rows, runs_batch)
        if key in _passed:
            continue
        model = _model(settings)
        if model is None:
            return
        rehearse(what, model, args, rows, settings.tokenizer, settings.peft_config(), runs_batch)
        _passed.add(key)
    if planned:
        _check_tokens(settings)


def _stages(settings: RunSettings, stages: Sequence[str]) -> list[tuple[str, list[str], AMAConfig]]:
    """Each stage's name for messages, the tasks whose pairs it trains on, and its arguments."""
    found = []
    if "specialists" in stages:
        for task in settings.task_args.tasks:
            if task.task in settings.chosen_tasks and settings.needs_specialist(task.task):
                found.append(
                    (f"The specialist of task '{task.task}'", [task.task], settings.specialist_arguments(task))
                )
    if "train" in stages:
        for strategy in settings.strategies:
            args = settings.with_arguments(mixing=strategy)
            found.append((f"The generalist '{strategy}'", settings.task_names, args))
    return found


def _model(settings: RunSettings) -> PreTrainedModel | None:
    init_kwargs = settings.training_args.model_init_kwargs
    trust = settings.training_args.trust_remote_code
    return empty_policy(settings.model_name, init_kwargs, settings.quantization_config(), trust)


def _key(settings: RunSettings, args: AMAConfig, rows: Dataset, runs_batch: bool) -> str:
    values = {name: value for name, value in args.to_dict().items() if name not in _OWN}
    peft = settings.peft_config()
    made_of = [settings.base_identity, values, peft and peft.to_dict(), str(rows.features), runs_batch]
    return json.dumps([*made_of, tokenizer_identity(settings.tokenizer)], default=repr, sort_keys=True)


def _check_tokens(settings: RunSettings) -> None:
    """Tokenise all pairs if the model's embeddings may not hold them; they seldom may not."""
    model = _model(settings)
    limits = None if model is None else TokenLimits(model, settings.tokenizer)
    if limits is None or not limits.apply:
        return
    for task in settings.chosen_tasks:
        for split in settings.data:
            pairs = settings.pairs_of(task, split)
            if pairs is not None and not {"image", "images"} & set(pairs.column_names):
                where = f"the {'held-out' if split == 'test' else 'training'} pairs of task '{task}'"
                limits.check(tokenise(pairs, settings.tokenizer, settings), where, settings.training_args.max_length)
