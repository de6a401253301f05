"""Held-out figures of base, specialists and generalists, by task and for the worst task."""

from typing import Any

import numpy as np
import torch
from accelerate.utils import release_memory
from datasets import Dataset

from ..common.errors import AMAError
from ..dpo.losses import PairLogProbs, PreferenceLossConfig, excess_losses, pair_losses
from ..dpo.pair_trainer import ScoringTrainer
from ..dpo.scoring import score_pairs
from ..metrics import task_metrics, worst_and_mean
from ..policies.switching import trained_policy
from ..recipe.settings import RunSettings
from ..reference_losses.columns import LOGP_COLUMNS, REFERENCE_COLUMNS, SPECIALIST_COLUMNS
from ..tasks.pairs import TASK_COLUMN
from .pair_scores import save_margins
from .run_losses import joined_data


def evaluate_policies(settings: RunSettings, policies: dict[str, str]) -> dict[str, Any]:
    """Score the held-out pairs with each policy and compare with base and specialists.

    Args:
        settings ([`RunSettings`]): The run.
        policies (`dict[str, str]`): Name → adapter or model folder, or Hub id.

    Returns:
        `dict` of `tasks` (names) and `policies`: for `base`, `specialists` and each of `policies`, `by_task` (see
        [`task_metrics`]) and `summary` (see [`worst_and_mean`]).

    Raises:
        AMAError: If there are no held-out pairs, or a policy cannot be read.
    """
    recipe, inputs = settings.recipe, settings.inputs
    if "test" not in inputs.data:
        raise AMAError(
            "No task has held-out pairs, so there is nothing to evaluate on. Set `eval_split` of the tasks, or "
            "`test_split_size` for all."
        )
    held_out = joined_data(settings)["test"]
    if len(held_out) == 0:
        raise AMAError(
            f"The prompts of all held-out pairs fill max_length ({recipe.training_args.max_length}), so there is nothing "
            "to evaluate on. Raise max_length."
        )
    trainer = ScoringTrainer(
        model=recipe.model_name,
        args=recipe.scoring_arguments(inputs.has_images),
        train_dataset=held_out,
        processing_class=inputs.processing_class,
        quantization_config=recipe.quantization_config(),
        peft_config=inputs.peft_config(),
    )
    pairs = trainer.train_dataset
    known = {name: np.asarray(pairs[name], dtype=np.float32) for name in LOGP_COLUMNS}
    result = {}
    tokens = None
    scored = {}
    for name, source in policies.items():
        scores = _scored(trainer, name, source, pairs)
        tokens = (scores["chosen_tokens"], scores["rejected_tokens"])
        scored[name] = (scores["chosen_logps"], scores["rejected_logps"])
    if tokens is None:  # nothing but base and specialists, whose log-probs are known
        collator = trainer.data_collator
        masks = [collator([pairs[row]])["completion_mask"].sum(dim=1).numpy() for row in range(len(pairs))]
        tokens = tuple(np.array([mask[side] for mask in masks]) for side in (0, 1))
    config = PreferenceLossConfig.from_args(recipe.training_args)
    everyone = {
        "base": tuple(known[name] for name in REFERENCE_COLUMNS),
        "specialists": tuple(known[name] for name in SPECIALIST_COLUMNS),
        **scored,
    }
    save_margins(settings.folder.margins, recipe.task_names, config.beta, pairs, everyone)
    for name, logps in everyone.items():
        by_task = _figures(pairs, logps, known, tokens, config, recipe.task_names)
        result[name] = {"by_task": by_task, "summary": worst_and_mean(by_task)}
    del trainer
    release_memory()
    return {"tasks": recipe.task_names, "policies": result}


def _scored(trainer: ScoringTrainer, name: str, source: str, pairs: Dataset) -> dict[str, np.ndarray]:
    """Log-probs under one policy, which nothing holds when it is done: the next may need its memory."""
    with trained_policy(trainer, f"the generalist '{name}'", source) as model:
        return score_pairs(trainer, model, pairs, f"Evaluating {name}")


def _figures(
    pairs: Dataset,
    logps: tuple[np.ndarray, np.ndarray],
    known: dict[str, np.ndarray],
    tokens: tuple[np.ndarray, np.ndarray],
    config: PreferenceLossConfig,
    tasks: list[str],
) -> dict[str, dict[str, float]]:
    lengths = [torch.as_tensor(count) for count in tokens]
    references = [torch.as_tensor(known[name]) for name in REFERENCE_COLUMNS]
    policy = PairLogProbs(*map(torch.as_tensor, logps), *references, *lengths)
    specialist = PairLogProbs(*(torch.as_tensor(known[name]) for name in SPECIALIST_COLUMNS), *references, *lengths)
    losses = pair_losses(policy, config)
    # Clipped by pair whatever the training used: one definition for every column of the table
    excess = excess_losses(losses, pair_losses(specialist, config), "pair")
    margins = config.beta * (policy.chosen_logratios - policy.rejected_logratios)
    return task_metrics(np.asarray(pairs[TASK_COLUMN]), losses.numpy(), margins.numpy(), excess.numpy(), tasks)
