"""Rehearses every stage of a run that trains, before the first of them does: see `dpo/rehearsal.py` for how."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from accelerate.utils import parse_flag_from_env
from datasets import DatasetDict
from transformers import PreTrainedModel
from trl import get_peft_config

from ..common.errors import AMAError
from ..common.others_errors import told
from ..dpo.config import MIXING_FIELDS, AMAConfig
from ..dpo.rehearsal import check_batches, check_optimization, empty_policy, read_config, rehearse
from ..dpo.tokens import tokenise
from ..policies.adapter_settings import check_adapter
from ..policies.identity import tokenizer_identity
from ..policies.quantized import check_quantization
from ..policies.token_limits import TokenLimits
from ..tasks.images import has_images
from ..tasks.pairs import TASK_COLUMN
from .inputs import RunInputs
from .recipe import Recipe


_PAIRS = 2  # of a stage's own that are tokenised; what is looked at is the settings
# What differs between stages, and nobody below AMATrainer looks at
_OWN = ("output_dir", "run_name", "logging_dir", "seed", "data_seed", "max_steps", "num_train_epochs", "hub_model_id", "push_to_hub",
        *MIXING_FIELDS, "specialists", "streaming_buffer", "save_strategy")  # fmt: skip
_passed: set[str] = set()  # by this process


def rehearse_stages(
    recipe: Recipe,
    inputs: RunInputs,
    stages: Sequence[str],
    pairs: Mapping[str, DatasetDict] | None = None,
    runs_batch: bool = False,
) -> None:
    """Rehearse the specialists and generalists that a run is going to train; equal ones once in a process.

    Args:
        recipe ([`Recipe`]): What the run is told.
        inputs ([`RunInputs`]): What it reads.
        stages (`Sequence[str]`): Its stages.
        pairs (`Mapping`, *optional*): Task → its pairs by split, if they were read already.
        runs_batch (`bool`): Whether a batch is run, too, which takes seconds for a model of many layers.

    Raises:
        AMAError: If one of them could not be trained.
    """
    planned = _stages(recipe, inputs, stages)
    if not planned:
        return
    if pairs is None:
        parts = {task: {split: inputs.pairs_of(task, split) for split in inputs.data} for task in recipe.task_names}
        pairs = {task: {split: part for split, part in own.items() if part is not None} for task, own in parts.items()}
    base = [recipe.model_name, _config(recipe), tokenizer_identity(inputs.tokenizer)]
    with told("The adapter cannot be made", "the lora_* keys"):
        peft_config = get_peft_config(recipe.model_args)
    for what, tasks, args in planned:
        first = pairs[tasks[0]]["train"]
        check_batches(what, args, sum(len(pairs[task]["train"]) for task in tasks), first.column_names)
        is_shared_out = args.fsdp or args.deepspeed_plugin is not None or parse_flag_from_env("ACCELERATE_USE_FSDP")
        if is_shared_out:
            continue
        if has_images(first):  # no batch of them is run without weights
            model = _model(recipe)
            if model is not None:
                check_optimization(args, model)
                if peft_config is not None:
                    check_adapter(model, peft_config)
            continue
        rows = first.select(range(min(_PAIRS, len(first)))).remove_columns(TASK_COLUMN)
        values = {name: value for name, value in args.to_dict().items() if name not in _OWN}
        key = _key(base, recipe.quantization_config(), peft_config, values, rows.features, runs_batch)
        if key in _passed:
            continue
        model = _model(recipe)
        if model is None:
            return
        rehearse(what, model, args, rows, inputs.tokenizer, peft_config, runs_batch)
        _passed.add(key)
    key = _key(base, "tokens")
    if key not in _passed and _check_tokens(recipe, inputs, pairs):
        _passed.add(key)


def model_problem(recipe: Recipe, inputs: RunInputs, pairs: Mapping[str, DatasetDict]) -> str | None:
    """Why the recipe's model, adapter and training arguments do not go together, found without weights; `None` if they do.

    Args:
        recipe ([`Recipe`]): What the run is told.
        inputs ([`RunInputs`]): What it reads.
        pairs (`Mapping`): Task → its pairs by split.
    """
    try:
        check_quantization(recipe.quantization_config(), recipe.uses_peft)
        rehearse_stages(recipe, inputs, ("specialists", "train"), pairs, runs_batch=True)
    except AMAError as error:
        return str(error)
    return None


def _stages(recipe: Recipe, inputs: RunInputs, stages: Sequence[str]) -> list[tuple[str, list[str], AMAConfig]]:
    """Each stage's name for messages, the tasks whose pairs it trains on, and its arguments."""
    found = []
    if "specialists" in stages:
        for task in recipe.task_args.tasks:
            if task.task in recipe.chosen_tasks and inputs.needs_specialist(task.task):
                found.append((f"The specialist of task '{task.task}'", [task.task], recipe.specialist_arguments(task)))
    if "train" in stages:
        for strategy in recipe.strategies:
            args = recipe.with_arguments(mixing=strategy)
            found.append((f"The generalist '{strategy}'", recipe.task_names, args))
    return found


def _config(recipe: Recipe) -> dict[str, Any]:
    init_kwargs = recipe.training_args.model_init_kwargs
    trust = recipe.training_args.trust_remote_code
    return read_config(recipe.model_name, revision=init_kwargs.get("revision"), trust_remote_code=trust).to_dict()


def _model(recipe: Recipe) -> PreTrainedModel | None:
    init_kwargs = recipe.training_args.model_init_kwargs
    trust = recipe.training_args.trust_remote_code
    return empty_policy(recipe.model_name, init_kwargs, recipe.quantization_config(), trust)


def _key(*made_of: Any) -> str:
    return json.dumps(made_of, default=repr, sort_keys=True)


def _check_tokens(recipe: Recipe, inputs: RunInputs, pairs: Mapping[str, DatasetDict]) -> bool:
    """Tokenise all pairs if the model's embeddings may not hold them; `True` if they hold whatever comes, as nearly always."""
    model = _model(recipe)
    limits = None if model is None else TokenLimits(model, inputs.tokenizer)
    if limits is None or not limits.apply(recipe.training_args.max_length):
        return True
    for task in recipe.chosen_tasks:
        for split, part in pairs[task].items():
            if not has_images(part):
                where = f"the {'held-out' if split == 'test' else 'training'} pairs of task '{task}'"
                limits.check(
                    tokenise(part, inputs.tokenizer, recipe.training_args), where, recipe.training_args.max_length
                )
    return False
