"""The mixture of one training run: strategy, sampler, the sums of the step under way, and their state."""

from collections.abc import Collection
from typing import Any

import numpy as np
from accelerate import Accelerator
from datasets import Dataset
from transformers import TrainingArguments

from ..common.arrays import numpy_column
from ..common.errors import AMAError
from ..common.run_folder import STATE_FILE
from ..common.versions import VERSIONS, check_version
from ..mixing import MixingStrategy, StepStatistics, build_strategy
from ..mixing.monitor import MixtureMonitor
from ..tasks.pairs import TASK_COLUMN
from .sampler import BlockSampler, TaskMixtureSampler, count_tasks
from .step_recorder import StepRecorder
from .streams import StreamSampler, TaskStreams


_CLIPPED_MEMORY = 10  # optimizer steps over which the share of clipped pairs is followed, about


def strategy_for(
    dataset: Dataset | Any, task_names: list[str], mixing: str, mixing_lr: float | str = "auto", **options: Any
) -> MixingStrategy:
    """Build a strategy over the tasks' numbers of pairs: 1 each if they are streamed or not told.

    Args:
        dataset (`Dataset`): The training pairs, with `task` numbers.
        task_names (`list[str]`): Names of those numbers.
        mixing (`str`): The strategy's name.
        mixing_lr (`float` or `str`): Its step size; `"auto"` for the regret bound's.
        options: Further ones of [`trl_ama.mixing.build_strategy`].

    Raises:
        AMAError: If the name or an option is not valid.
    """
    if isinstance(dataset, Dataset) and TASK_COLUMN in dataset.column_names:
        sizes = count_tasks(numpy_column(dataset, TASK_COLUMN), len(task_names))
    else:
        sizes = np.ones(len(task_names))
    return build_strategy(mixing, sizes, mixing_lr=None if mixing_lr == "auto" else mixing_lr, **options)


class Mixture:
    """What a trainer keeps beside the model.

    Args:
        strategy ([`MixingStrategy`]): Decides draws and weights.
        task_names (`list[str]`): Names of the task numbers.
        excess_range (`float`): Excess of an untrained policy over a perfect specialist, in nats.
        has_excess (`bool`): Whether there is an excess to log: not for a fixed mixture without reference losses.
        unknown (`Collection[str]`): Figures that nobody knows here, and that are not logged.

    Attributes:
        clipped_lately (`float`, *optional*): Share of pairs without excess in the last optimizer steps, the latest counting most;
            `None` before the first.
    """

    def __init__(
        self,
        strategy: MixingStrategy,
        task_names: list[str],
        excess_range: float,
        has_excess: bool = True,
        unknown: Collection[str] = (),
    ):
        self.strategy = strategy
        self.recorder = StepRecorder(len(task_names))
        self.sampler: BlockSampler | None = None
        self._task_names = task_names
        self._excess_range = excess_range
        self._has_excess = has_excess
        self._unknown = frozenset(unknown)
        self._first_state = strategy.state_dict()
        self._monitor = MixtureMonitor(task_names)
        self._num_steps = 0
        self.clipped_lately: float | None = None
        self._logged_as: dict[str, list[str]] = {}
        # Of the last step: pairs without a finite loss, by task, and pairs in all
        self.broken_pairs: dict[str, int] = {}
        self.step_pairs = 0

    def make_sampler(self, dataset: Dataset | TaskStreams, args: TrainingArguments, batch_size: int) -> BlockSampler:
        """A new sampler over the dataset's tasks, for one `train()`, whose loaders have batches of `batch_size`."""
        per_loader_step = batch_size * args.world_size
        if isinstance(dataset, TaskStreams):
            block_size = per_loader_step * args.gradient_accumulation_steps
            self.sampler = StreamSampler(dataset, self.strategy, block_size, args.max_steps)
            return self.sampler
        length = len(dataset)
        self.sampler = TaskMixtureSampler(
            numpy_column(dataset, TASK_COLUMN),
            self.strategy,
            block_size=per_loader_step * args.gradient_accumulation_steps,
            seed=args.data_seed if args.data_seed is not None else args.seed,
            epoch_draws=length - length % per_loader_step if args.dataloader_drop_last else length,
        )
        return self.sampler

    def begin(self, num_steps: int) -> None:
        """Start the mixture of a run of `num_steps` optimizer steps."""
        self._reset(num_steps)
        self.strategy.load_state_dict(self._first_state)
        self.strategy.set_horizon(num_steps, self._excess_range)

    def resume(self, num_steps: int, state: dict[str, Any] | None, skips_data: bool) -> None:
        """Continue a run of `num_steps` from a checkpoint's state.

        Args:
            num_steps (`int`): Optimizer steps of the whole run.
            state (`dict`): What `state_dict` returned; `None` if the checkpoint has none.
            skips_data (`bool`): Whether the trainer skips the batches that it already trained on.

        Raises:
            AMAError: If there is no state, or it is of other tasks, another strategy or another sampler.
        """
        if not self.strategy.uses_own_sampler and (state is None or state.get("task_names") != self._task_names):
            # A fixed mixture learns nothing that could be lost: as DPOTrainer, it goes on with other data
            self._reset(num_steps)
            return
        if state is None:
            raise AMAError(
                "The checkpoint has no mixing state: it was not written by AMATrainer. Start without "
                "resume_from_checkpoint."
            )
        check_version(STATE_FILE, state, "resume with the trl-ama that wrote it, or start a new output_dir")
        if state.get("task_names") != self._task_names:
            raise AMAError(
                f"The checkpoint's mixing state has task_names={state.get('task_names')!r}, this run has "
                f"task_names={self._task_names!r}. Resume with the tasks that it was written with, or start a new output_dir."
            )
        self._reset(num_steps)
        self.strategy.load_state_dict(state["strategy"])
        self._monitor.load_state_dict(state["monitor"])
        self.clipped_lately = state.get("clipped_lately")
        if self.sampler is not None:
            self.sampler.load_state_dict(state["sampler"], skips_data)

    def _reset(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._monitor = MixtureMonitor(self._task_names)
        self.clipped_lately = None
        self.recorder.reset()

    def state_dict(self) -> dict[str, Any]:
        """Strategy and sampler, as JSON types."""
        return {
            "version": VERSIONS[STATE_FILE],
            "task_names": self._task_names,
            "strategy": self.strategy.state_dict(),
            "sampler": None if self.sampler is None else self.sampler.state_dict(),
            "monitor": self._monitor.state_dict(),
            "clipped_lately": self.clipped_lately,
        }

    def finish_step(self, accelerator: Accelerator) -> tuple[dict[str, float], list[str]]:
        """After an optimizer step: sum over processes, log, and let the strategy see it, unless a pair had no finite loss.

        Returns:
            `tuple` of the step's figures (`ama/<figure>/<task>`) and what there is to warn about.
        """
        drawn_with = self.strategy.probabilities() if self.sampler is None else self.sampler.pop_trained()
        step = self.recorder.finish(drawn_with, accelerator)
        self.broken_pairs = {
            self._task_names[task]: int(step.broken_counts[task]) for task in np.flatnonzero(step.broken_counts)
        }
        self.step_pairs = int(step.counts.sum())
        self._follow_clipped(step)
        figures = self._figures(step)
        matched = (step.counts > 0) & (step.clipped_counts == step.counts)
        sends = bool((self.strategy.loss_weights() * step.excess_sums).any())  # a gradient
        if not self.broken_pairs:
            # The policy takes no step either: the rest of the pairs would be a biased sample of their tasks, as a NaN is more
            # likely where the loss is large
            self.strategy.observe(step)
        if self.strategy.objective == "loss":
            return figures, []
        excess = np.full(len(matched), np.nan) if self.broken_pairs else step.mean_excess()
        weights = self.strategy.mixture_weights()
        return figures, self._monitor.update(
            weights, excess, self._num_steps, matched, bool(matched.any()) and not (sends or self.broken_pairs)
        )

    def _follow_clipped(self, step: StepStatistics) -> None:
        if self.step_pairs:
            share = float(step.clipped_counts.sum()) / self.step_pairs
            before = share if self.clipped_lately is None else self.clipped_lately
            self.clipped_lately = before + (share - before) / _CLIPPED_MEMORY

    def _figures(self, step: StepStatistics) -> dict[str, float]:
        figures: dict[str, float] = {}
        for name, values in self._known(self.strategy.metrics()):
            figures.update(zip(self._keys(name), values.tolist(), strict=True))
        sums = {"loss": step.loss_sums}
        if self._has_excess:
            sums |= {"excess": step.excess_sums, "clipped_fraction": step.clipped_counts}
        finite = step.finite_counts
        drawn = np.flatnonzero(finite)
        for name, values in self._known(sums):
            keys = self._keys(name)
            means = values[drawn] / finite[drawn]
            figures.update(zip([keys[index] for index in drawn], means.tolist(), strict=True))
        return figures

    def _known(self, figures: dict[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
        return [(name, values) for name, values in figures.items() if name not in self._unknown]

    def _keys(self, name: str) -> list[str]:
        """What a figure is logged as, by task."""
        if name not in self._logged_as:
            self._logged_as[name] = [f"ama/{name}/{task}" for task in self._task_names]
        return self._logged_as[name]
