"""What a run will need, stage by stage: memory on one device, steps, tokens, and cost in units of one plain DPO run.

The unit is TRL's `DPOTrainer` on the pairs that the generalist draws, as often: every pair as two padded rows, through the policy
forward and backward and through the reference forward. Cost is counted in products of matrices, which is what the time of a
training goes into; see docs/plan.md for what is left out.
"""

from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import ceil
from typing import Any

from ..common.errors import AMAError
from ..dpo.config import AMAConfig
from ..recipe.settings import RunSettings
from .bytes import optimizer_family
from .cost import Work
from .lengths import Lengths, Pair, common_beginning, count_lengths, largest_batch, scoring_batch
from .memory import StageMemory
from .model import PlannedModel


_BY_SIZE = ("proportional", "task_normalized")  # strategies that draw tasks by their number of pairs


@dataclass
class StagePlan:
    """One stage: what it runs, on one device, and how long. `memory` is that of the largest batch of all its runs."""

    name: str
    runs: int  # how many trainings or sweeps
    memory: StageMemory | None
    steps: int | None
    tokens: int | None  # that pass through a model, once for each pass forward
    cost: float | None  # in plain DPO runs


@dataclass
class Plan:
    """A run's plan: `stages` in order, `variants` of the generalist (name → memory), and `notes` for the user."""

    model: str
    device: str
    processes: int
    stages: list[StagePlan]
    variants: dict[str, StageMemory]
    plain_steps: int | None
    notes: list[str] = field(default_factory=list)

    @property
    def total_cost(self) -> float | None:
        """All stages against one plain DPO run."""
        costs = [stage.cost for stage in self.stages if stage.memory is not None]
        return None if any(cost is None for cost in costs) else sum(costs)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; bytes, tokens and steps are whole numbers."""
        return {**asdict(self), "total_cost": self.total_cost}


def make_plan(settings: RunSettings, device: str = "cuda", processes: int = 1, sharding: str | None = None) -> Plan:
    """Plan a run.

    Args:
        settings ([`RunSettings`]): The parsed recipe.
        device (`str`): `"cuda"` or `"cpu"`: where it will run, whatever this machine has.
        processes (`int`): How many processes share the pairs.
        sharding (`str`, *optional*): What spreads the model over devices (`"FSDP"`, `"DEEPSPEED"`), which is not modelled.

    Raises:
        AMAError: If configuration or tokenizer of the base model cannot be read, or the settings do not go together.
    """
    return _Planner(settings, device, processes, sharding).plan()


class _Planner:
    def __init__(self, settings: RunSettings, device: str, processes: int, sharding: str | None):
        self.recipe, self.inputs = settings.recipe, settings.inputs
        self.device, self.processes, self.sharding = device, processes, sharding
        self.args = self.recipe.training_args
        self.model = PlannedModel(self.recipe, device, distributed=processes > 1 and sharding is None)
        self.lengths, self.notes = count_lengths(self.recipe, self.inputs, self.args.max_length)

    def plan(self) -> Plan:
        if not self.parts("train"):
            raise AMAError(
                f"The prompts of all training pairs fill max_length ({self.args.max_length}) alone. Raise max_length, or choose "
                "other data."
            )
        stages = [self.specialists(), self.losses(), self.generalists(), self.evaluation()]
        variants = self.variants()
        self.add_notes(next(stage.memory for stage in stages if stage.name == "generalists"))
        steps = self.steps(self.args, _count(self.parts("train")))
        return Plan(self.recipe.model_name, self.device, self.processes, stages, variants, steps, self.notes)

    def add_notes(self, generalist: StageMemory) -> None:
        if generalist.activations is None:
            self.notes.append(f"Activations are unknown, and peaks are lower bounds: {generalist.why_plain}.")
        elif not generalist.packed:
            self.notes.append(f"Planned without the fast path: {self.model.why_plain or generalist.why_plain}.")
        if optimizer_family(self.model.memory_settings(self.args).optim) is None:
            self.notes.append(
                f"The states of optim '{self.model.memory_settings(self.args).optim}' are not known here and taken for AdamW's."
            )
        everything = [part for parts in self.lengths.values() for part in parts.values() if not part.assumed]
        dropped = sum(part.count for part in everything) - sum(
            part.cut(self.args.max_length, self.args.truncation_mode).count for part in everything
        )
        if dropped:
            self.notes.append(
                f"About {dropped:,} pairs are left out: their prompts fill max_length ({self.args.max_length} tokens), and DPOTrainer "
                "drops them."
            )
        if self.sharding is not None:
            self.notes.append(
                f"{self.sharding} spreads weights, gradients or optimizer states over devices, which is not modelled: memory is that "
                "of one device that holds everything, as without it."
            )
        elif self.processes > 1:
            self.notes.append(
                f"{self.processes} processes, as DistributedDataParallel runs them: each has a device of its own that holds all weights "
                "and optimizer states, and gradients twice (the second time in the buckets that are sent); optimizer steps are "
                "divided among them."
            )

    # ---- The pairs ----

    def parts(self, split: str, tasks: list[str] | None = None, args: AMAConfig | None = None) -> list[Lengths]:
        """The pairs of some tasks, or of all, as `max_length` leaves them; tasks of which it leaves none are not among them."""
        args, lengths = args or self.args, self.lengths.get(split, {})
        parts = [lengths[task] for task in (lengths if tasks is None else tasks) if task in lengths]
        parts = [part.cut(args.max_length, args.truncation_mode) for part in parts]
        return [part for part in parts if len(part.pairs)]

    # ---- Stages ----

    def specialists(self) -> StagePlan:
        needed = [task for task in self.recipe.task_args.tasks if self.inputs.needs_specialist(task.task)]
        steps, tokens, work = 0, 0, 0.0
        largest: dict[Any, tuple] = {}  # settings of memory → the largest batch under them
        for task in needed:
            args = self.recipe.specialist_arguments(task)
            parts = self.parts("train", [task.task], args)
            if not parts:
                self.notes.append(f"No pair of task '{task.task}' is left, so its specialist cannot be trained.")
                continue
            own = self.steps(args, parts[0].count)
            pairs = largest_batch(parts, args.per_device_train_batch_size, self.model.packs)
            key = (self.model.memory_settings(args), args.precompute_ref_log_probs)
            if key not in largest or _rows(pairs, self.model.packs) > _rows(largest[key][0], self.model.packs):
                largest[key] = (pairs, common_beginning(parts), args)
            drawn = None if own is None else own * self.batch(args)
            passes = self.work(parts, [1.0], args.per_device_train_batch_size)
            steps, tokens, work = (
                _sum(steps, own),
                _sum(tokens, drawn, 2 * passes.tokens),
                _sum(work, drawn, passes.training(args.gradient_checkpointing) + passes.scoring()),
            )
        memories = [
            self.model.memory(True, args, pairs, common, self.model.is_full and not args.precompute_ref_log_probs)
            for pairs, common, args in largest.values()
        ]
        return self.stage("specialists", len(needed), memories, steps, tokens, work)

    def losses(self) -> StagePlan:
        """Base and specialist in one sweep over each task's pairs, training and held-out ones alike."""
        tasks = [task for task in self.recipe.task_names if task not in self.inputs.shared_tasks]
        sweeps = [[part for split in self.lengths for part in self.parts(split, [task])] for task in tasks]
        return self.sweeps("reference losses", len(tasks), 2, sweeps)

    def generalists(self) -> StagePlan:
        args, parts = self.args, self.parts("train")
        strategies = self.recipe.strategies
        steps, tokens, work = 0, 0, 0.0
        for strategy in strategies:
            own = self.steps(args, _count(parts))
            drawn = None if own is None else own * self.batch(args)
            passes = self.work(parts, self.shares(strategy, parts), args.per_device_train_batch_size)
            steps, tokens, work = (
                _sum(steps, own),
                _sum(tokens, drawn, passes.tokens),
                _sum(work, drawn, passes.training(args.gradient_checkpointing)),
            )
        return self.stage("generalists", len(strategies), [self.generalist()], steps, tokens, work)

    def generalist(self, packed: bool = True, **changes: Any) -> StageMemory:
        """Memory of a generalist's training."""
        parts = self.parts("train")
        pairs = largest_batch(parts, self.args.per_device_train_batch_size, packed and self.model.packs)
        return self.model.memory(True, self.args, pairs, common_beginning(parts), False, packed, **changes)

    def evaluation(self) -> StagePlan:
        """A sweep of each generalist over all held-out pairs; what base and specialists have is known by then."""
        strategies = self.recipe.strategies
        return self.sweeps("evaluation", len(strategies), len(strategies), [self.parts("test")])

    def sweeps(self, name: str, runs: int, passes: int, sweeps: list[list[Lengths]]) -> StagePlan:
        """Sweeps over the pairs of some tasks each, in which so many policies are run on every pair."""
        sweeps = [parts for parts in sweeps if parts]
        if not sweeps:
            return StagePlan(name, 0, None, 0, 0, 0.0)
        size = self.args.precompute_ref_batch_size or self.args.per_device_eval_batch_size
        batches, tokens, work = [], 0, 0.0
        for parts in sweeps:
            pairs = scoring_batch(parts, size, self.model.packs)
            batches.append((pairs, common_beginning(parts)))
            for part in parts:
                one = self.work([part], [1.0], len(pairs))
                tokens = _sum(tokens, part.count, passes * one.tokens)
                work = _sum(work, part.count, passes * one.scoring())
        pairs, common = max(batches, key=lambda batch: _rows(batch[0], self.model.packs))
        # Base and specialist, or base and generalist, are two models if they are not adapters
        memory = self.model.memory(False, self.args, pairs, common, self.model.is_full)
        return self.stage(name, runs, [memory], None, tokens, work)

    def stage(self, name: str, runs: int, memories: list[StageMemory], steps, tokens, work) -> StagePlan:
        memory = max(memories, key=lambda one: one.peak, default=None)
        unit = self.plain_work
        cost = None if work is None or not unit else work / unit
        return StagePlan(name, runs, memory, steps, None if tokens is None else round(tokens), cost)

    def variants(self) -> dict[str, StageMemory]:
        """The generalist's memory, with and without gradient checkpointing, packed and padded."""
        return {
            f"{'packed' if packed else 'padded'} pairs, {'with' if checkpoints else 'without'} gradient checkpointing": self.generalist(
                packed, gradient_checkpointing=checkpoints
            )
            for packed in ((True, False) if self.model.packs else (False,))
            for checkpoints in (False, True)
        }

    # ---- Steps and cost ----

    def batch(self, args: AMAConfig) -> int:
        """Pairs of an optimizer step, of all processes."""
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * self.processes

    def steps(self, args: AMAConfig, count: int | None) -> int | None:
        """Optimizer steps, as the Trainer counts them; `None` if the number of pairs decides and is not known."""
        if args.max_steps > 0:
            return args.max_steps
        if count is None:
            return None
        size = args.per_device_train_batch_size * self.processes
        batches = count // size if args.dataloader_drop_last else ceil(count / size)
        return ceil(args.num_train_epochs * max(1, ceil(batches / args.gradient_accumulation_steps)))

    def shares(self, strategy: str, parts: list[Lengths]) -> list[float]:
        """How often a strategy draws each task; of adaptive ones, how they begin."""
        by_size = strategy in _BY_SIZE or (strategy == "ama_r" and self.args.sampling == "proportional")
        counts = [part.count for part in parts]
        if not by_size or None in counts:
            return [1 / len(parts)] * len(parts)
        return [count / sum(counts) for count in counts]

    def work(self, parts: list[Lengths], shares: list[float], batch_size: int) -> Work:
        """What a pair takes on our path, on average, in batches of so many."""
        return Work.of(self.model.products, parts, shares, batch_size, self.model.packs)

    @cached_property
    def plain_work(self) -> float | None:
        """The unit of cost."""
        parts = self.parts("train")
        steps = self.steps(self.args, _count(parts))
        if steps is None:
            return None
        shares = self.shares(self.args.mixing, parts)
        pair = Work.of(
            self.model.products, parts, shares, self.args.per_device_train_batch_size, packed=False, trl=True
        )
        checkpoints = self.args.gradient_checkpointing
        return steps * self.batch(self.args) * (pair.training(checkpoints) + pair.scoring())


def _sum(total: float | None, count: float | None, each: float = 1) -> float | None:
    """`total` and `count` times `each`; `None` if one of them is unknown."""
    return None if total is None or count is None else total + count * each


def _rows(pairs: list[Pair], packed: bool) -> int:
    """Tokens of a batch, in one packed row or in padded rows."""
    if packed:
        return sum(map(sum, pairs))
    return 2 * len(pairs) * max(prompt + max(chosen, rejected) for prompt, chosen, rejected in pairs)


def _count(parts: list[Lengths]) -> int | None:
    counts = [part.count for part in parts]
    return None if None in counts else sum(counts)
