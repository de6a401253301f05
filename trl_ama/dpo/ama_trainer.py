import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, DatasetDict, IterableDataset
from peft import PeftConfig, PeftModel
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)
from trl.trainer.utils import get_config_model_id

from ..common.errors import AMAError
from ..policies.checks import check_policy_source
from ..policies.objects import check_is_model, check_specialist_objects
from ..reference_losses.columns import LOGP_COLUMNS, REFERENCE_COLUMNS, SPECIALIST_COLUMNS
from ..sampling.mixture import Mixture, strategy_for
from ..tasks.held_out import check_eval_dataset, eval_parts
from ..tasks.images import has_images
from ..tasks.pairs import TASK_COLUMN
from ..training.by_task import EvaluationByTask
from ..training.exact_resume import ExactResume
from ..training.mixed import MixedTraining
from ..training.published import Published
from .card import NAME, PAPER, TAGS, complete_card, template_for_trl
from .checks import (
    check_arguments,
    check_best_metric,
    check_columns,
    check_config,
    check_no_task_lost,
    check_specialists,
    check_token_counts,
    check_train_dataset,
    descends_trl_loss,
)
from .clipped import ClippedPairs
from .config import AMAConfig
from .losses import BATCH_LOSSES, PreferenceLossConfig, excess_losses, pair_losses, untrained_loss
from .pair_batches import COUNTED, broken_on_plain_path
from .pair_trainer import PairTrainer
from .precision import check_full_fp16
from .reference_trainer import ReferenceLogProbs
from .streams import checked_losses, stream_arguments
from .training_pairs import default_arguments, training_pairs


logger = get_logger(__name__)


class AMATrainer(MixedTraining, EvaluationByTask, Published, ExactResume, ReferenceLogProbs, PairTrainer):
    """
    Trainer for AutoMixAlign (AMA): one model that is good at several preference tasks.

    It is a [`~trl.DPOTrainer`] that differs in three things: batches are drawn by task, as the mixing strategy says; the
    loss it descends is each pair's excess over its task's specialist; and after each optimizer step the strategy sees the
    step's excess by task and moves towards the task that lags most. Every argument of [`~trl.DPOTrainer`] works.

    Example:

    ```python
    from trl_ama import AMAConfig, AMATrainer

    trainer = AMATrainer(
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        args=AMAConfig(mixing="ama_s", specialists={"helpful": "org/helpful-lora", "harmless": "org/harmless-lora"}),
        train_dataset=dataset,  # preference pairs with a `task` column
        peft_config=LoraConfig(),
    )
    trainer.train()
    ```

    Args:
        model, ref_model, data_collator, processing_class, compute_metrics, callbacks, optimizers, quantization_config, \
peft_config:
            As in [`~trl.DPOTrainer`].
        args ([`AMAConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used; for one task, that of [`~trl.DPOTrainer`].
        train_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict[str, IterableDataset]`):
            Preference pairs with a `task` column (string or `ClassLabel`), or task → stream of its pairs. With `mixing="proportional"`
            also pairs without a `task`, and one stream, which is read as it comes. With the columns `ref_chosen_logps` and
            `ref_rejected_logps`, no reference model is loaded or run; with `specialist_chosen_logps` and
            `specialist_rejected_logps` as well, these are the reference losses.
        eval_dataset (*optional*):
            As in [`~trl.DPOTrainer`]. With a `task` column, figures by task are logged as `eval_ama/<figure>/<task>`, and
            `eval_worst_excess`, `eval_worst_accuracy`, `eval_mean_excess` and `eval_mean_accuracy` over tasks.
        specialists (`dict`, *optional*):
            Task → adapter path, Hub id or model; overrides `args.specialists`.

    Attributes:
        task_names (`list[str]`): The tasks.
        strategy (`MixingStrategy`): The mixing strategy.
        has_reference_losses (`bool`): Whether the pairs are held against their specialists.
        clipped_pairs (`ClippedPairs`): Leaves pairs without a gradient out of the backward pass.

    Raises:
        AMAError: If the data, the specialists or the configuration do not fit together; before any model is loaded where
            that can be seen.
    """

    numbers_in_batches = LOGP_COLUMNS
    in_place_of = "DPOTrainer"
    # Of its card, as TRL writes it
    _name, _tag_names, _paper, _template_file = NAME, TAGS, PAPER, template_for_trl()

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        ref_model: PreTrainedModel | None = None,
        args: AMAConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | dict[str, IterableDataset] | None = None,
        eval_dataset: Dataset | DatasetDict | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        specialists: dict[str, Any] | None = None,
    ):
        model_name = model if isinstance(model, str) else get_config_model_id(model.config)
        if args is not None:
            check_config(args)
            specialists = specialists if specialists is not None else args.specialists
        check_train_dataset(train_dataset)
        check_eval_dataset(eval_dataset)
        pairs = training_pairs(train_dataset, None if args is None else args.mixing, specialists)
        if args is None:
            args = default_arguments(model_name, pairs)
        self.task_names, self.have_tasks = pairs.task_names, pairs.have_tasks
        eval_dataset = self.with_task_names(eval_dataset, "eval_dataset")
        specialists = check_specialists(specialists, self.task_names)
        if isinstance(model, str):
            check_is_model(model)
        check_specialist_objects(model, specialists or {}, peft_config)
        for task, source in (specialists or {}).items():
            if isinstance(source, str):  # before a single pair is scored
                check_policy_source(
                    model_name,
                    f"the specialist of task '{task}'",
                    source,
                    base_revision=(args.model_init_kwargs or {}).get("revision") if isinstance(model, str) else None,
                    trust_remote_code=args.trust_remote_code,
                )
        has_reference, has_specialist = check_columns(pairs.source, eval_dataset, ref_model)
        self.has_reference_losses = has_specialist or specialists is not None
        self.pair_loss_config = PreferenceLossConfig.of_pairs(args)
        self.rows_have_losses = bool(self.pair_loss_config.loss_type)
        strategy = strategy_for(pairs.source, self.task_names, **args.mixing_options)
        check_arguments(args, strategy, self.has_reference_losses)
        check_best_metric(args, strategy, eval_dataset, has_specialist, specialists is not None)
        if isinstance(model, str):
            check_full_fp16(args, (args.model_init_kwargs or {}).get("dtype", "float32"), peft_config is None)
        if pairs.streams is not None:
            args = stream_arguments(args, strategy, has_reference, has_specialist, specialists)
        self.reference_given = self.reference_unchecked = has_reference
        # DPOTrainer then loads no reference model, and `_precompute_ref_logps` computes nothing that is there
        is_full = peft_config is None and not (not isinstance(model, str) and is_peft_model(model))
        if has_reference and is_full and not has_images(pairs.dataset):
            args = copy.copy(args)  # the caller's stays as it is
            args.precompute_ref_log_probs = True

        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=data_collator,
            train_dataset=pairs.dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        if has_reference and has_images(pairs.dataset):
            self.ref_model = None  # of pairs with images DPOTrainer cannot be told not to load one
        parts = eval_parts(self.eval_dataset)
        unknown = set() if self.rows_have_losses else {"loss"}
        if pairs.streams is not None:
            self.train_dataset = pairs.streams.prepared(self)
        elif isinstance(self.train_dataset, Dataset):
            check_no_task_lost(pairs.dataset, self.train_dataset, self.task_names, args.max_length)
            parts["train_dataset"] = self.train_dataset
        else:
            self.train_dataset = checked_losses(self.train_dataset, pairs.column_names, args)
            unknown |= {"probability", "weight"}
        for role, part in parts.items():
            check_token_counts(part, role, args.max_length, args.truncation_mode)
        strategy = strategy_for(
            self.train_dataset, self.task_names, **args.mixing_options
        )  # over the pairs that are left
        self._has_excess = self.has_reference_losses or strategy.objective == "excess"
        self.mixture = Mixture(
            strategy, self.task_names, untrained_loss(self.pair_loss_config), self._has_excess, unknown=unknown
        )
        self.clipped_pairs = ClippedPairs(self)
        if specialists is not None and not has_specialist:
            self.score_specialists(specialists)
        elif not self.has_reference_losses and self.strategy.objective == "excess":
            logger.warning(
                "There are no reference losses (no `specialist_*_logps` columns, no `specialists`), so mixing="
                f"'{args.mixing}' is plain worst-case DPO: it follows the task with the highest loss."
            )

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        for column in (TASK_COLUMN, *LOGP_COLUMNS) if self.have_tasks else ():
            if column not in self._signature_columns:
                self._signature_columns.append(column)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        super().create_model_card(model_name=model_name, dataset_name=dataset_name, tags=tags)
        if self.is_world_process_zero():
            complete_card(self)

    def broken_by_themselves(self, model: torch.nn.Module, batches: list[dict[str, Any]]) -> dict[str, int]:
        # In a packed row, a NaN reaches its neighbours
        return {} if self.prefix_sharing.mode is False else broken_on_plain_path(self, model, batches)

    # ---- Loss ----

    def tasks_of(self, inputs: dict[str, Any]) -> torch.Tensor | None:
        """The task numbers of a batch, `None` if it does not tell them. # (B,)"""
        if self.have_tasks:
            return inputs.get(TASK_COLUMN)
        return inputs["input_ids"].new_zeros(len(inputs["input_ids"]) // 2)  # chosen and rejected rows

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        task_ids = self.tasks_of(inputs)
        inputs.pop(TASK_COLUMN, None)
        counted = inputs.pop(COUNTED, None)
        specialist = [inputs.pop(column, None) for column in SPECIALIST_COLUMNS]
        if REFERENCE_COLUMNS[0] not in inputs and self.ref_model is None and not is_peft_model(self.model):
            why = (
                "the training pairs carry theirs, so none was loaded. Give the held-out pairs these columns too (`trl ama-losses` does)"
                if self.reference_given
                else "they were computed before training (precompute_ref_log_probs). Let your data_collator pass these columns on"
            )
            raise AMAError(f"These pairs lack {list(REFERENCE_COLUMNS)} and there is no reference model: {why}.")
        training = self.model.training
        two_passes = training and not return_outputs and self.clipped_pairs.pay(model)
        forward = self.policy_forward(model, inputs, graph=not two_passes)
        with self.reference_from_inputs():
            result = super().compute_loss(forward, inputs, return_outputs, num_items_in_batch)
        if not training and not self.have_tasks or task_ids is None:  # as DPOTrainer does
            if training and not descends_trl_loss(self.strategy):
                raise AMAError(
                    f"The training batches have no 'task', by which mixing='{self.args.mixing}' weighs pairs. If you make the loader, take that "
                    "of `AMATrainer.get_train_dataloader`, or add each pair's task number."
                )
            return result
        loss = result[0] if return_outputs else result

        pairs = forward.log_probs(inputs, self.ld_alpha)
        if self.reference_unchecked and training:
            self.check_reference(pairs)
        losses = pair_losses(pairs, self.pair_loss_config)  # (B,)
        if specialist[0] is None:
            baseline = torch.zeros_like(losses)
        else:
            with torch.no_grad():
                baseline = pair_losses(
                    replace(pairs, chosen=specialist[0], rejected=specialist[1]), self.pair_loss_config
                )
        excess = excess_losses(losses, baseline, self.args.excess_clip)  # (B,)

        if not training:
            knows_excess = specialist[0] is not None or (self._has_excess and not self.has_reference_losses)
            margins = self.beta * (pairs.chosen_logratios - pairs.rejected_logratios)
            self.record_eval(task_ids, losses, margins, excess, knows_excess)
            return result
        whole, own = losses, len(losses) if counted is None else counted[0]
        if own < len(losses):
            task_ids, losses, excess, baseline = (values[:own] for values in (task_ids, losses, excess, baseline))
        self.mixture.recorder.add(task_ids, losses, excess, losses.detach() - baseline)
        if descends_trl_loss(self.strategy):
            if counted is None or self.use_weighting or set(self.loss_types) & set(BATCH_LOSSES):
                return result
            loss = self.loss_without_repeats(whole, counted, forward.outputs)
            return (loss, result[1]) if return_outputs else loss
        # The Trainer divides by the number of micro-batches, and gradients are averaged over processes; dividing by a
        # micro-batch's mean size here makes it (1/|B|) Σ over the step's pairs, also where an epoch ends with smaller ones
        mean_micro_batch = float(np.mean(self.pairs_of_rounds)) / self.accelerator.num_processes
        weights = torch.as_tensor(self.strategy.loss_weights(), dtype=losses.dtype)
        weights = weights.to(losses.device, non_blocking=True)[task_ids]  # (B,)
        objective = excess if self.strategy.objective == "excess" else losses
        loss = (weights * objective).sum() / mean_micro_batch
        if not forward.has_graph:
            rest = len(whole) - own
            sends = F.pad(
                ~(losses < baseline), (0, rest)
            )  # at zero the clipped excess has a gradient; NaN is to be seen
            factors = F.pad(weights / mean_micro_batch, (0, rest))
            return self.clipped_pairs.with_gradient(loss, sends, factors, forward, inputs)
        self.clipped_pairs.ran_whole(model)
        if self.aux_loss_enabled:
            share = 1 if counted is None else own * self.accelerator.num_processes / counted[1]
            loss = loss + self.router_aux_loss_coef * forward.outputs.aux_loss * share
        return (loss, result[1]) if return_outputs else loss
