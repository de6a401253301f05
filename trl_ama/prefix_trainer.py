"""DPOTrainer with the faster forward pass of `prefix_sharing.py`, and nothing else."""

import contextlib
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from trl import DPOTrainer

from .exact_resume import ExactResume
from .prefix_support import PrefixSharing
from .quantized import keep_weights


class PrefixSharingTrainer(DPOTrainer):
    """
    A [`~trl.DPOTrainer`] whose reference log-probs come from the fast path.

    TRL runs the reference inside of its loss, out of reach of a stand-in for the model, so they are computed before it and
    handed over as precomputed ones are.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for model in (self.model, self.ref_model):
            if model is not None:
                keep_weights(model)

    @cached_property
    def prefix_sharing(self) -> PrefixSharing:
        """Chooses the path of every call; `args.prefix_sharing` says how, `"auto"` for a `DPOConfig`."""
        return PrefixSharing(self, getattr(self.args, "prefix_sharing", "auto"))

    def compute_ref_log_probs(
        self, model: torch.nn.Module, inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Reference log-probs of a batch, as DPOTrainer computes them. # (B,), (B,)"""
        return super().compute_ref_log_probs(self.prefix_sharing.forward(model, metrics=False), inputs)

    def with_reference(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch with its reference log-probs, which are computed if it has none."""
        if "ref_chosen_logps" in inputs:
            return inputs
        chosen, rejected = self.compute_ref_log_probs(self.ref_model or self.model, inputs)  # (B,) each
        return {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    @contextlib.contextmanager
    def reference_from_inputs(self) -> Iterator[None]:
        """While open, DPOTrainer reads the reference log-probs from the batch."""
        before, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            yield
        finally:
            self.precompute_ref_logps = before


class SpecialistTrainer(ExactResume, PrefixSharingTrainer):
    """
    Trainer of one task's specialist: TRL's DPO, with every forward pass on the fast path and checkpoints that are exact.

    Its whole difference from [`~trl.DPOTrainer`] in the numbers: the loss is given a stand-in for the model.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = self.with_reference(inputs)
        with self.reference_from_inputs():
            return super().compute_loss(self.prefix_sharing.forward(model), inputs, return_outputs, num_items_in_batch)
