"""The trainers of pairs: DPOTrainer with the faster forward pass of `fast_path/packing.py`, and on several processes with the numbers
of one."""

import atexit
import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from transformers import TrainerCallback
from trl import DPOTrainer

from ..common.errors import AMAError, first_line
from ..common.processes import from_main, is_sharded, whole_models
from ..fast_path.choice import PrefixSharing
from ..fast_path.collating import PackingCollator, ready_pairs
from ..policies.objects import check_is_model, check_policy
from ..policies.own_adapter import OwnBase
from ..policies.placement import tell_of_spread
from ..policies.quantized import keep_weights
from ..tasks.images import has_images
from ..tasks.rows import first_failure
from ..training.exact_resume import ExactResume
from ..training.finite_steps import FiniteSteps
from .losses import PreferenceLossConfig, pair_losses
from .pair_batches import COUNTED, RecordedForward, mark_repeats
from .precision import keep_output_precision, prepare_for_fp16
from .start_errors import StartErrors


_TEMPORARY = "_reference_logps-"
_OF_BASE = "-of-the-base"


class _SetEpoch(TrainerCallback):
    """Tells the Trainer's own sampler which epoch it is when a run of several processes is resumed in the middle of one.

    The loader that skips what was trained on hides the sampler behind one wrapper too many, so that nobody else does.
    """

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if args.world_size > 1 and hasattr(train_dataloader, "set_epoch"):
            train_dataloader.set_epoch(int(state.epoch))


class _ProveAgain(TrainerCallback):
    """A training, and one that is resumed, proves the fast path on its own first batch."""

    def __init__(self, sharing: PrefixSharing):
        self._sharing = sharing

    def on_train_begin(self, args, state, control, **kwargs):
        self._sharing.forget()


class PairTrainer(FiniteSteps, StartErrors, DPOTrainer):
    """
    A [`~trl.DPOTrainer`] whose reference log-probs come from the fast path.

    TRL runs the reference inside of its loss, out of reach of a stand-in for the model, so they are computed before it and
    handed over as precomputed ones are. And they are those of the base as it was, where the policy's adapter changes it: see
    [`OwnBase`].

    Attributes:
        own_base ([`OwnBase`]): What differs between the base under the policy and the base as it was.
        pairs_of_rounds (`list[int]`): Of the optimizer step under way, the pairs that count in each round of micro-batches, on all
            processes together. # (M,)
    """

    def __init__(self, model, ref_model=None, *args, **kwargs):
        check_policy(model, ref_model is not None)
        self.own_base = OwnBase()
        try:
            with self.own_base.watched(model):
                super().__init__(model, ref_model, *args, **kwargs)
        except OSError as error:
            if isinstance(model, str):
                check_is_model(model, error=error)
            raise
        if isinstance(model, str) and not is_peft_model(self.model):
            check_policy(self.model, False)  # a repository can hold a model and an adapter, which is then put on it
        for model in (self.model, self.ref_model):
            if model is not None:
                keep_weights(model)
        tell_of_spread(self.model, self.accelerator.device)
        self.pairs_of_rounds = [self.accelerator.num_processes]  # of a batch outside of training, its sum
        self.add_callback(_SetEpoch())
        self.add_callback(_ProveAgain(self.prefix_sharing))

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        keep_output_precision(self.accelerator)  # before a reference model is shared out, too

    def train(self, *args, **kwargs):
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise AMAError(
                "No weight of the policy is trainable. Load its adapter for training, `PeftModel.from_pretrained(base, adapter, "
                "is_trainable=True)`, or unfreeze the model."
            )
        prepare_for_fp16(self.model, self.args)
        return super().train(*args, **kwargs)

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        """As DPOTrainer's, whose errors are those of a chat template or a tokenizer; here the row is named, too."""

        def prepare(part):
            return super(PairTrainer, self)._prepare_dataset(part, processing_class, args, dataset_name)

        try:
            return prepare(dataset)
        except (AMAError, OSError, MemoryError):
            raise
        except Exception as error:
            if not isinstance(dataset, Dataset) or len(dataset) == 0:
                raise
            row, error = first_failure(prepare, dataset, error)
            raise AMAError(
                f"Row {row} of the {dataset_name} pairs cannot be tokenised ({type(error).__name__}: {first_line(error)}). Give prompt, "
                "chosen and rejected of every row as strings, or as lists of {role, content} that the model's chat template takes."
            ) from error

    @cached_property
    def prefix_sharing(self) -> PrefixSharing:
        """Chooses the path of every call; `args.prefix_sharing` says how, `"auto"` for a `DPOConfig`."""
        return PrefixSharing(self, getattr(self.args, "prefix_sharing", "auto"))

    def compute_ref_log_probs(
        self, model: torch.nn.Module, inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Reference log-probs of a batch, as DPOTrainer computes them. # (B,), (B,)"""
        with contextlib.nullcontext() if self.ref_model is not None else self.own_base.reference(self):
            forward = self.prefix_sharing.forward(model, metrics=False, ready=ready_pairs(inputs))
            return super().compute_ref_log_probs(RecordedForward(forward), inputs)

    def with_reference(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch with its reference log-probs, which are computed if it has none."""
        if "ref_chosen_logps" in inputs:
            return inputs
        # A compiled model has no truth value
        model = self.model if self.ref_model is None else self.ref_model
        chosen, rejected = self.compute_ref_log_probs(model, inputs)  # (B,) each
        chosen, rejected = (logps.to(inputs["input_ids"].device) for logps in (chosen, rejected))
        return {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    def policy_forward(self, model: torch.nn.Module, inputs: dict[str, Any], graph: bool = True) -> RecordedForward:
        """The policy, to be called by DPOTrainer's loss on this batch, which gets reference log-probs if it has none; without
        `graph`, some pairs are then run again.

        They are computed first, while there is no graph in memory; but after it, as DPOTrainer does, where both may draw random
        numbers.
        """
        forward = self.prefix_sharing.forward(model, ready=ready_pairs(inputs), graph=graph)
        if self.model.training and self.prefix_sharing.may_draw(model):
            return RecordedForward(forward, then=lambda: inputs.update(self.with_reference(inputs)))
        inputs.update(self.with_reference(inputs))
        return RecordedForward(forward)

    # ---- Batches ----

    @contextlib.contextmanager
    def _collating_pairs(self) -> Iterator[None]:
        """While a loader is made, the collator also packs its batches."""
        if self.prefix_sharing.mode is False or has_images(self.train_dataset):
            yield
            return
        own = self.data_collator
        self.data_collator = PackingCollator(own, self.accelerator.device)
        try:
            yield
        finally:
            self.data_collator = own

    def get_train_dataloader(self):
        with self._collating_pairs():
            return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset=None):
        with self._collating_pairs():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        with self._collating_pairs():
            return super().get_test_dataloader(test_dataset)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        known = isinstance(self.train_dataset, Dataset) and not self.args.dataloader_drop_last
        self.pairs_of_rounds = mark_repeats(batches, self.accelerator, len(self.train_dataset) if known else None)
        return batches, num_items

    def loss_without_repeats(self, losses: torch.Tensor, counted: tuple[int, int], outputs: Any) -> torch.Tensor:
        """DPOTrainer's loss of a batch with repeats that do not count, of which its own is the mean; see `mark_repeats`.

        Args:
            losses (`torch.Tensor`): Of the batch's pairs. # (B,)
            counted (`tuple[int, int]`): What it was marked with.
            outputs: The model's.
        """
        own, of_all = counted
        share = self.accelerator.num_processes / of_all  # gradients are averaged over processes
        loss = losses[:own].sum() * share
        return loss + self.router_aux_loss_coef * outputs.aux_loss * own * share if self.aux_loss_enabled else loss

    def _precompute_ref_logps(self, dataset, name, batch_size):
        if self.own_base.moves_reference and self._precompute_model_hash is not None:
            # TRL's cached ones are those of the model with its adapter disabled
            self._precompute_model_hash = f"{self._precompute_model_hash.removesuffix(_OF_BASE)}{_OF_BASE}"
        if self.accelerator.num_processes == 1 or not isinstance(dataset, Dataset) or dataset.cache_files:
            with self._collating_pairs():
                return super()._precompute_ref_logps(dataset, name, batch_size)
        # Of a dataset in memory TRL keeps the result in the temporary folder of each process, where the others look for it
        # in vain. Here all use one, which is gone when the run is
        folder = from_main(lambda: _temporary_folder(self.args.output_dir))
        dataset._get_cache_file_path = lambda fingerprint: os.path.join(folder, f"cache-{fingerprint}.arrow")
        try:
            with self._collating_pairs():
                return super()._precompute_ref_logps(dataset, name, batch_size)
        finally:
            del dataset._get_cache_file_path

    @contextlib.contextmanager
    def reference_from_inputs(self) -> Iterator[None]:
        """While open, DPOTrainer reads the reference log-probs from the batch."""
        before, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            yield
        finally:
            self.precompute_ref_logps = before


class SpecialistTrainer(ExactResume, PairTrainer):
    """
    Trainer of one task's specialist: TRL's DPO, with every forward pass on the fast path and checkpoints that are exact.

    Its whole difference from [`~trl.DPOTrainer`] in the numbers: the loss is given a stand-in for the model.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        counted = inputs.get(COUNTED)
        inputs = {name: value for name, value in inputs.items() if name != COUNTED}
        forward = self.policy_forward(model, inputs)
        with self.reference_from_inputs():
            result = super().compute_loss(forward, inputs, return_outputs, num_items_in_batch)
        if counted is None or self.use_weighting:
            return result
        losses = pair_losses(forward.log_probs(inputs, self.ld_alpha), PreferenceLossConfig.from_args(self.args))
        return self.loss_without_repeats(losses, counted, forward.outputs)


class ScoringTrainer(PairTrainer):
    """A `DPOTrainer` that only scores: everything but training (loading, tokenisation, device, precision) is TRL's.

    Its whole difference: no second model is loaded, nothing is computed for the reference, and every process has the whole
    model, so that each scores pairs of its own.
    """

    def __init__(self, *args, **kwargs):
        with whole_models():
            super().__init__(*args, **kwargs)
        if has_images(self.train_dataset):
            self.ref_model = None  # of pairs with images DPOTrainer cannot be told not to load one
        if is_sharded(self.accelerator):  # where the Trainer leaves it to be placed when it is shared out
            self.model.to(self.accelerator.device)

    def _precompute_ref_logps(self, dataset, name, batch_size):
        return dataset


def _temporary_folder(parent: str) -> str:
    os.makedirs(parent, exist_ok=True)  # which all processes see, on whatever machine they are
    for left in Path(parent).glob(f"{_TEMPORARY}*"):  # by a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    folder = os.path.abspath(tempfile.mkdtemp(prefix=_TEMPORARY, dir=parent))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
