"""One sweep over preference pairs: which of them are scored together, on which process, and on which path."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from trl import DPOTrainer

from ..common.errors import AMAError
from ..common.processes import is_sharded
from ..fast_path.choice import PrefixSharing
from ..fast_path.collating import PackingCollator, ready_pairs
from ..fast_path.forward import causal_lm, packed_forward
from ..fast_path.packing import PackedPairs
from ..policies.switching import Policy
from ..reference_losses.columns import REFERENCE_COLUMNS
from ..tasks.images import has_images
from ..training.by_task import TaskCollator
from .losses import sequence_logps
from .pair_trainer import ScoringTrainer
from .prefetch import one_ahead, pinned, works_ahead
from .scored_rows import scored_columns, sequence_lengths


_NOT_FOR_THE_MODEL = ("completion_mask", *REFERENCE_COLUMNS)


class Sweep:
    """What scoring does with one batch, and which batches there are."""

    def __init__(self, trainer: DPOTrainer, policies: dict[str, Policy], dataset: Dataset):
        self._trainer, self._policies = trainer, policies
        self._knows_lengths = not has_images(dataset)
        self._rows = dataset.select_columns(scored_columns(dataset))
        self._sharing = getattr(trainer, "prefix_sharing", None) or PrefixSharing(trainer, "auto")
        own = trainer.data_collator
        while isinstance(own, TaskCollator | PackingCollator):  # ours; what a user's own wraps is its business
            own = own.inner
        self._collator = own
        if self._sharing.mode is not False and self._knows_lengths:
            self._collator = PackingCollator(self._collator, trainer.accelerator.device)
        self._collating = threading.Lock()  # one at a time, as tokenizers of images' collators have to
        # Whether every process has to run a model as often as the others: it was shared out for training
        self.in_step = is_sharded(trainer.accelerator) and not isinstance(trainer, ScoringTrainer)
        self._plain: set[str] = set()  # policies that the fast path does not get right
        self._longest, self._packed = sequence_lengths(dataset, trainer.args.max_length)
        batch_size = trainer.args.precompute_ref_batch_size or trainer.args.per_device_eval_batch_size
        self._budget = int(2 * batch_size * self._longest.max(initial=0))
        count = len(dataset)
        self.scores = {
            f"{prefix}{side}_logps": np.zeros(count, dtype=np.float32)
            for prefix in policies
            for side in ("chosen", "rejected")
        } | {f"{side}_tokens": np.zeros(count, dtype=np.int32) for side in ("chosen", "rejected")}

    def tokens(self, rows: np.ndarray) -> int:
        """Tokens of some rows, once for every policy."""
        return int(self._packed[rows].sum()) * len(self._policies)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """All policies in evaluation mode."""
        models = []
        for policy in self._policies.values():
            with policy() as model:
                models.append(model)
        before = [(model, model.training) for model in models]
        try:
            for model in models:
                model.eval()
            yield
        finally:
            for model, training in reversed(before):
                model.train(training)

    def prove(self, done: np.ndarray) -> None:
        """Run the sweep's first batch both ways under every policy, on all processes; also if it is done, so that what is found
        does not depend on where a sweep was stopped."""
        if self._sharing.mode is not False and not done.all():
            _, kwargs = self._inputs(self._collated(next(self.batches())))
            at_once = max(1, self._budget // kwargs["input_ids"].shape[1] // 2)
            self._plain = self._sharing.plain_policies(self._policies, kwargs, at_once)

    def rounds(self, done: np.ndarray) -> Iterator[list[np.ndarray]]:
        """What the processes score at the same time: a batch for each, or at the end for the first of them.

        The batches depend on neither what is done nor how many processes there are, so neither do the numbers.

        Args:
            done (`np.ndarray`): Pairs that are scored already. # (N,) bool
        """
        count = self._trainer.accelerator.num_processes
        batches = self._remaining(done)
        if count > 1 and batches and not self._all_packed(batches[0]) and self.in_step:
            batches = self._remaining(done, padded=True)  # `score` could not split them as long as the others wait
        for first in range(0, len(batches), count):
            yield batches[first : first + count]

    def _remaining(self, done: np.ndarray, padded: bool = False) -> list[np.ndarray]:
        batches = (rows[~done[rows]] for rows in self.batches(padded))
        return [rows for rows in batches if len(rows)]

    def _all_packed(self, rows: np.ndarray) -> bool:
        """Whether rows take the fast path under every policy. The same rows everywhere, so all processes take the same."""
        mask, kwargs = self._inputs(self._collated(rows))
        packed = []
        for prefix, policy in self._policies.items():
            with torch.no_grad(), policy() as model, self._trainer.accelerator.autocast():
                packed.append(prefix not in self._plain and self._pack(model, kwargs, mask) is not None)
        return all(packed)

    def share(self) -> None:
        """Give all processes what each has scored: every value is of one process and zero on the others, so sums are exact."""
        accelerator = self._trainer.accelerator
        if accelerator.num_processes == 1 or len(self._rows) == 0:
            return
        values = torch.from_numpy(np.stack([value.astype(np.float32) for value in self.scores.values()]))
        values = accelerator.reduce(values.to(accelerator.device), reduction="sum").cpu().numpy()
        self.scores = {
            name: own.astype(value.dtype) for (name, value), own in zip(self.scores.items(), values, strict=True)
        }

    def batches(self, padded: bool = False) -> Iterator[np.ndarray]:
        """Rows that are scored together: longest first, so that an out-of-memory shows at once, and like with like.

        As many as hold no more tokens in one packed row, or `padded`, than the padded batch of the longest `batch_size` pairs
        has; `batch_size` pairs if their lengths are not known.
        """
        order = np.lexsort((self._packed, self._longest))[::-1]
        if padded or self._sharing.mode is False:
            yield from self._padded_batches(order)
            return
        totals = self._packed[order].cumsum()
        start = 0
        while start < len(order):
            before = totals[start - 1] if start else 0
            end = max(start + 1, int(np.searchsorted(totals, before + self._budget, side="right")))
            yield order[start:end]
            start = end

    def _padded_batches(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Of rows that come longest first, as many as hold no more tokens than that when they are padded."""
        start = 0
        while start < len(rows):
            count = max(1, self._budget // (2 * max(1, int(self._longest[rows[start]]))))
            yield rows[start : start + count]
            start += count

    def one_ahead(self, done: np.ndarray) -> Iterator[tuple[list[np.ndarray], Callable[[], dict[str, Any] | None]]]:
        """As `rounds`, each with the collated batch of this process, which is made while a device runs the one before."""
        place = self._trainer.accelerator.process_index

        def collated(batches: list[np.ndarray]) -> dict[str, Any] | None:
            return self._collated(batches[place]) if place < len(batches) else None

        if works_ahead(self._trainer.accelerator.device):
            yield from one_ahead(self.rounds(done), collated)
        else:
            for batches in self.rounds(done):
                yield batches, functools.partial(collated, batches)

    def _collated(self, rows: np.ndarray) -> dict[str, Any]:
        with self._collating:
            batch = self._collator([self._rows[int(row)] for row in rows])
        gpu = self._trainer.accelerator.device.type == "cuda"
        return pinned(batch) if gpu and self._trainer.args.dataloader_pin_memory else batch

    def _inputs(self, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        """The completion mask (2B, L) of a batch, and what the model is called with."""
        device = self._trainer.args.device
        batch = send_to_device(batch, device, non_blocking=device.type == "cuda")
        inputs = self._trainer._prepare_inputs(batch)
        mask = inputs["completion_mask"]
        kwargs = {key: value for key, value in inputs.items() if key not in _NOT_FOR_THE_MODEL}
        kwargs |= {
            "labels": inputs["input_ids"].masked_fill(mask == 0, -100),
            "use_cache": False,
            "fused_lm_head": True,
        }
        return mask, kwargs

    def _pack(self, model: torch.nn.Module, kwargs: dict[str, Any], mask: torch.Tensor) -> PackedPairs | None:
        return self._sharing.pack(model, kwargs, ready=ready_pairs({**kwargs, "completion_mask": mask}))

    def score(
        self,
        rows: np.ndarray,
        prefixes: Iterable[str] | None = None,
        keep: bool = True,
        batch: dict[str, Any] | None = None,
    ) -> None:
        """Fill in the scores of rows that come longest first, under some policies or all; or only run them.

        Args:
            rows (`np.ndarray`): Their numbers. # (B,)
            prefixes (`Iterable[str]`, *optional*): Of the policies; all without.
            keep (`bool`): Whether the scores are kept.
            batch (`dict`, *optional*): The rows as collated, if they are.
        """
        trainer, scores = self._trainer, self.scores
        mask, kwargs = self._inputs(self._collated(rows) if batch is None else batch)
        packed, too_many = {}, []
        for prefix in self._policies if prefixes is None else prefixes:
            # Not inference_mode: on a model of 135M parameters it is no faster, and what a model keeps between calls
            # (rotary tables, masks, repacked weights) would be of no use to a training step with the same model
            with torch.no_grad(), self._policies[prefix]() as model, trainer.accelerator.autocast():
                inner = causal_lm(model)
                if inner not in packed and prefix not in self._plain:
                    packed[inner] = self._pack(model, kwargs, mask)
                pairs = None if prefix in self._plain else packed[inner]
                # So many rows were meant for the fast path
                is_too_large = self._knows_lengths and len(rows) > 1 and kwargs["input_ids"].numel() > self._budget
                if pairs is None and is_too_large and not self.in_step:
                    too_many.append(prefix)
                    continue
                outputs = (
                    model(**kwargs) if pairs is None else packed_forward(model, pairs, metrics=False, use_cache=False)
                )
            if not keep:
                continue
            for side, logps in zip(
                ("chosen", "rejected"), sequence_logps(outputs.log_probs, mask, trainer.args.ld_alpha), strict=True
            ):
                scores[f"{prefix}{side}_logps"][rows] = logps.cpu().numpy()
        if keep:
            tokens = mask.sum(dim=1).cpu().numpy()  # (2B,)
            if not self._knows_lengths and not tokens.all():
                raise AMAError(
                    f"max_length ({trainer.args.max_length}) leaves nothing of an answer to a prompt with an image. Raise it: an image "
                    "is many tokens, and DPOTrainer does not drop such pairs."
                )
            scores["chosen_tokens"][rows], scores["rejected_tokens"][rows] = np.split(tokens, 2)
        if too_many:
            for part in self._padded_batches(rows):
                self.score(part, too_many)
