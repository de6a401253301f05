"""Sequence log-probs of preference pairs, under one policy or several in one sweep over the pairs."""

import contextlib
import functools

import numpy as np
import torch
from accelerate.utils import tqdm
from datasets import Dataset
from peft import PeftModel
from tqdm.std import tqdm as ProgressBar
from transformers import PreTrainedModel
from trl import DPOTrainer

from ..common import interruption
from ..common.arrays import numpy_column, with_columns
from ..common.processes import from_main
from ..policies.switching import Policy, reference_policy, trained_policy, trained_policy_and_reference
from ..reference_losses.columns import LOGP_COLUMNS, REFERENCE_COLUMNS, SPECIALIST_COLUMNS
from ..reference_losses.shards import LossShards
from ..tasks.pairs import TASK_COLUMN
from .scored_rows import unit_of
from .sweep import Sweep


def score_pairs(
    trainer: DPOTrainer, model: torch.nn.Module, dataset: Dataset, description: str
) -> dict[str, np.ndarray]:
    """Summed completion log-probs of every pair under one model; see [`score_policies`].

    Returns:
        `dict` of `chosen_logps`, `rejected_logps` (nats, float32) and `chosen_tokens`, `rejected_tokens`. # (N,) each
    """
    return score_policies(trainer, {"": functools.partial(contextlib.nullcontext, model)}, dataset, description)


def score_policies(
    trainer: DPOTrainer,
    policies: dict[str, Policy],
    dataset: Dataset,
    description: str,
    shards: LossShards | None = None,
    overall: ProgressBar | None = None,
) -> dict[str, np.ndarray]:
    """Summed completion log-probs of every pair under each policy, in the dataset's order.

    One sweep: a batch is collated and packed once and run under one policy after the other. Several processes share the
    batches, which are the same for any number of them, and so are the results, which every process gets.

    Args:
        trainer (`DPOTrainer`): Gives the collator, device, precision and `ld_alpha`.
        policies (`dict[str, Policy]`): Prefix of the columns' names, e.g. `"ref_"` → opens a model with TRL's fused LM head.
            A policy is opened again for every batch; what is costly about it should be open already.
        dataset (`Dataset`): Pairs as `DPOTrainer` prepares them: `prompt_ids`, `chosen_ids`, `rejected_ids`; or, of pairs with
            images, the rows as they are. # N rows
        description (`str`): For the progress bar.
        shards ([`LossShards`], *optional*): Where the numbers are kept while the sweep lasts. What is there is not scored
            again.
        overall (`tqdm`, *optional*): A bar over several sweeps, to be moved along.

    Returns:
        `dict` of `<prefix>chosen_logps`, `<prefix>rejected_logps` (nats, float32) and `chosen_tokens`, `rejected_tokens`.
        # (N,) each
    """
    sweep = Sweep(trainer, policies, dataset)
    accelerator = trainer.accelerator
    done = np.zeros(len(dataset), dtype=bool)
    if shards is not None:
        done = from_main(lambda: shards.load(sweep.scores))  # all skip the same pairs, whenever they look
        if done.any():
            accelerator.print(f"{description}: {done.sum()} of {len(done)} pairs were scored before.", flush=True)
    with sweep.evaluating(), contextlib.ExitStack() as stack:
        if shards is not None:
            stack.enter_context(shards)
            stack.enter_context(interruption.finishing())
        found = sweep.tokens(np.flatnonzero(done))
        if overall is not None and not overall.disable:
            overall.initial += found  # not counted in the rate
            overall.n += found
        progress = stack.enter_context(
            tqdm(
                total=sweep.tokens(np.arange(len(dataset))),
                initial=found,
                desc=description,
                disable=trainer.args.disable_tqdm,
                unit=unit_of(dataset),
                unit_scale=True,
                leave=overall is None or overall.disable,
            )
        )
        sweep.prove(done)
        pairs, before = int(done.sum()), int(done.sum())
        rounds = stack.enter_context(contextlib.closing(sweep.one_ahead(done)))
        for batches, collated in rounds:
            if accelerator.process_index < len(batches):
                rows = batches[accelerator.process_index]
                sweep.score(rows, batch=collated())
                if shards is not None:
                    shards.add(rows, sweep.scores)
            elif sweep.in_step:
                sweep.score(batches[0], keep=False)  # the others cannot do without this process
            rows = np.concatenate(batches)
            pairs += len(rows)
            if shards is not None and interruption.asked():
                shards.save()
                interruption.leave(f"saved {pairs} of {len(dataset)} scored pairs ({description})")
            if not progress.disable:
                rate = (pairs - before) / max(progress.format_dict["elapsed"], 1e-9)
                progress.set_postfix_str(f"{pairs}/{len(dataset)} pairs, {rate:.3g} pairs/s", refresh=False)
            for bar in (progress, overall):
                if bar is not None:
                    bar.update(sweep.tokens(rows))
    sweep.share()
    return sweep.scores


def score_reference_and_specialist(
    trainer: DPOTrainer,
    who: str,
    specialist: "str | PreTrainedModel | PeftModel",
    dataset: Dataset,
    description: str,
    shards: LossShards | None = None,
    overall: ProgressBar | None = None,
) -> dict[str, np.ndarray]:
    """One sweep under the reference policy and a specialist, or two where the specialist changes the reference.

    Args:
        who, specialist: As in [`trained_policy`].
        trainer, dataset, description, shards, overall: As in [`score_policies`].

    Returns:
        As [`score_policies`], with the prefixes `ref_` and `specialist_`.

    Raises:
        AMAError: If the specialist belongs to another base model or cannot be read.
    """
    with trained_policy_and_reference(trainer, who, specialist) as (model, reference):
        policies: dict[str, Policy] = {"specialist_": functools.partial(contextlib.nullcontext, model)}
        if reference is not None:
            policies = {"ref_": reference, **policies}
        scores = score_policies(trainer, policies, dataset, description, shards, overall)
    if reference is None:
        policies = {"ref_": functools.partial(reference_policy, trainer)}
        scores |= score_policies(trainer, policies, dataset, f"{description}: base", shards, overall)
    return scores


def add_logp_columns(
    trainer: DPOTrainer, dataset: Dataset, task_names: list[str], specialists: dict, split: str
) -> Dataset:
    """Add the columns of `LOGP_COLUMNS` that are missing, each pair scored by the reference and its task's specialist.

    Args:
        trainer (`DPOTrainer`): Holds the base model.
        dataset (`Dataset`): Prepared pairs with `task` numbers. # N rows
        task_names (`list[str]`): Names of those numbers.
        specialists (`dict`): Task name to adapter path, Hub id or model.
        split (`str`): For the progress bars.
    """
    given = REFERENCE_COLUMNS[0] in dataset.column_names
    missing = SPECIALIST_COLUMNS if given else LOGP_COLUMNS
    columns = {column: np.zeros(len(dataset), dtype=np.float32) for column in missing}
    tasks = numpy_column(dataset, TASK_COLUMN)
    for index, task in enumerate(task_names):
        rows = np.flatnonzero(tasks == index)
        if len(rows) == 0:
            continue
        who, pairs, text = (
            f"the specialist of task '{task}'",
            dataset.select(rows),
            f"Reference losses, {task}, {split}",
        )
        if given:
            scores = _score_specialist(trainer, who, specialists[task], pairs, text)
        else:
            scores = score_reference_and_specialist(trainer, who, specialists[task], pairs, text)
        for column, values in columns.items():
            values[rows] = scores[column]
    return with_columns(dataset, columns)


def _score_specialist(
    trainer: DPOTrainer, who: str, specialist: "str | PreTrainedModel | PeftModel", pairs: Dataset, text: str
) -> dict[str, np.ndarray]:
    """Log-probs under one specialist, which nothing holds when it is done: the next may need its memory."""
    with trained_policy(trainer, who, specialist) as model:
        return {f"specialist_{key}": values for key, values in score_pairs(trainer, model, pairs, text).items()}
