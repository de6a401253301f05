"""What a run will need, stage by stage: memory on one device, steps, tokens, and cost in units of one plain DPO run.

The unit is TRL's `DPOTrainer` on the pairs that the generalist draws, as often: every pair as two padded rows, through the policy
forward and backward and through the reference forward. Cost is counted in products of matrices, which is what the time of a
training goes into; see docs/plan.md for what is left out.
"""

from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from math import ceil
from typing import Any

import torch
from transformers import AutoConfig, BitsAndBytesConfig, PretrainedConfig
from trl import get_peft_config

from .ama_config import AMAConfig
from .errors import AMAError, first_line
from .memory_plan import (
    MemorySettings,
    StageMemory,
    empty_model,
    optimizer_family,
    scoring_memory,
    training_memory,
    why_not_packed,
)
from .plan_cost import Products, Work
from .plan_lengths import Lengths, Pair, common_beginning, count_lengths, largest_batch, scoring_batch
from .prefix_sharing import KNOWN_ATTENTION
from .prefix_support import broken_rule
from .run_settings import RunSettings


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
        self.settings, self.device, self.processes, self.sharding = settings, device, processes, sharding
        self.args = settings.training_args
        self.peft_config = get_peft_config(settings.model_args)
        self.lengths, self.notes = count_lengths(settings, self.args.max_length)
        self._memories: dict[Any, StageMemory] = {}

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
        return Plan(self.settings.model_name, self.device, self.processes, stages, variants, steps, self.notes)

    def add_notes(self, generalist: StageMemory) -> None:
        if generalist.activations is None:
            self.notes.append(f"Activations are unknown, and peaks are lower bounds: {generalist.why_plain}.")
        elif not generalist.packed:
            self.notes.append(f"Planned without the fast path: {self.why_plain or generalist.why_plain}.")
        if optimizer_family(self.memory_settings(self.args).optim) is None:
            self.notes.append(
                f"The states of optim '{self.memory_settings(self.args).optim}' are not known here and taken for AdamW's."
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

    # ---- The model ----

    @cached_property
    def config(self) -> PretrainedConfig:
        init = self.args.model_init_kwargs
        try:
            return AutoConfig.from_pretrained(
                self.settings.model_name, revision=init.get("revision"), trust_remote_code=self.args.trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise AMAError(
                f"The configuration of '{self.settings.model_name}' cannot be read: {first_line(error)} Check model_name_or_path."
            ) from error

    @cached_property
    def quantization(self) -> BitsAndBytesConfig | None:
        stored = getattr(self.config, "quantization_config", None)
        try:
            asked = self.settings.quantization_config()
            if asked is not None or stored is None:
                return asked
            stored = stored if isinstance(stored, dict) else stored.to_dict()
            if "bitsandbytes" in str(stored.get("quant_method")):
                return BitsAndBytesConfig.from_dict(stored)
        except (ImportError, ValueError, TypeError) as error:
            raise AMAError(f"The quantisation cannot be planned: {first_line(error)} Install bitsandbytes.") from error
        raise AMAError(
            f"The weights of '{self.settings.model_name}' are stored as '{stored.get('quant_method')}', and a plan knows bitsandbytes "
            "alone. Plan the model that they were made from, with load_in_4bit or load_in_8bit."
        )

    def memory_settings(self, args: AMAConfig) -> MemorySettings:
        """What of the training arguments decides memory."""
        init = args.model_init_kwargs
        dtype = init.get("dtype", "float32")
        if dtype == "auto":
            dtype = getattr(self.config, "dtype", None) or torch.float32
        return MemorySettings(
            dtype=dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype),
            autocast=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
            quantization=self.quantization,
            peft_config=self.peft_config,
            attention=init.get("attn_implementation"),
            gradient_checkpointing=args.gradient_checkpointing,
            optim=str(getattr(args.optim, "value", args.optim)),
            accumulates=args.gradient_accumulation_steps > 1,
            distributed=self.processes > 1 and self.sharding is None,
            device=self.device,
        )

    @cached_property
    def model(self) -> torch.nn.Module:
        """The model without weights, to be counted and never run."""
        return empty_model(self.config, self.memory_settings(self.args))

    @cached_property
    def products(self) -> Products:
        return Products.of(self.model, self.peft_config is None, self.device)

    @cached_property
    def why_plain(self) -> str | None:
        """Why the fast path is not taken, if it is not: by the rules, and by a look at which layers know packed rows."""
        settings = self.memory_settings(self.args)
        if self.args.prefix_sharing is False:
            return "prefix_sharing is off"
        if settings.attention not in (None, *KNOWN_ATTENTION):
            return f"attn_implementation='{settings.attention}' is not one of {list(KNOWN_ATTENTION)}"
        reason = broken_rule(self.model, self.args)
        return why_not_packed(self.config, settings) if reason is None else reason

    @property
    def packs(self) -> bool:
        """Whether pairs run as packed rows."""
        return self.why_plain is None

    def memory(
        self,
        trains: bool,
        args: AMAConfig,
        pairs: list[Pair],
        common: int,
        second: bool,
        packed: bool = True,
        **changes: Any,
    ) -> StageMemory:
        packed = packed and self.packs
        settings = replace(self.memory_settings(args), **changes)
        if not trains:  # two sweeps that differ in what only a training knows are the same
            settings = replace(settings, gradient_checkpointing=False, accumulates=False, distributed=False)
        common = common if packed and len(pairs) > 1 else 0
        key = (trains, settings, tuple(pairs), common, second, packed, args.max_length)
        if key not in self._memories:
            function = training_memory if trains else scoring_memory
            self._memories[key] = function(self.config, settings, pairs, packed, second, args.max_length, common)
        return self._memories[key]

    # ---- The pairs ----

    def parts(self, split: str, tasks: list[str] | None = None, args: AMAConfig | None = None) -> list[Lengths]:
        """The pairs of some tasks, or of all, as `max_length` leaves them; tasks of which it leaves none are not among them."""
        args, lengths = args or self.args, self.lengths.get(split, {})
        parts = [lengths[task] for task in (lengths if tasks is None else tasks) if task in lengths]
        parts = [part.cut(args.max_length, args.truncation_mode) for part in parts]
        return [part for part in parts if len(part.pairs)]

    # ---- Stages ----

    def specialists(self) -> StagePlan:
        needed = [task for task in self.settings.task_args.tasks if self.settings.needs_specialist(task.task)]
        steps, tokens, work = 0, 0, 0.0
        largest: dict[Any, tuple] = {}  # settings of memory → the largest batch under them
        for task in needed:
            args = self.settings.specialist_arguments(task)
            parts = self.parts("train", [task.task], args)
            if not parts:
                self.notes.append(f"No pair of task '{task.task}' is left, so its specialist cannot be trained.")
                continue
            own = self.steps(args, parts[0].count)
            pairs = largest_batch(parts, args.per_device_train_batch_size, self.packs)
            key = (self.memory_settings(args), args.precompute_ref_log_probs)
            if key not in largest or _rows(pairs, self.packs) > _rows(largest[key][0], self.packs):
                largest[key] = (pairs, common_beginning(parts), args)
            drawn = None if own is None else own * self.batch(args)
            passes = self.work(parts, [1.0], args.per_device_train_batch_size)
            steps, tokens, work = (
                _sum(steps, own),
                _sum(tokens, drawn, 2 * passes.tokens),
                _sum(work, drawn, passes.training(args.gradient_checkpointing) + passes.scoring()),
            )
        memories = [
            self.memory(True, args, pairs, common, self.peft_config is None and not args.precompute_ref_log_probs)
            for pairs, common, args in largest.values()
        ]
        return self.stage("specialists", len(needed), memories, steps, tokens, work)

    def losses(self) -> StagePlan:
        """Base and specialist in one sweep over each task's pairs, training and held-out ones alike."""
        tasks = [task for task in self.settings.task_names if task not in self.settings.shared_tasks]
        sweeps = [[part for split in self.lengths for part in self.parts(split, [task])] for task in tasks]
        return self.sweeps("reference losses", len(tasks), 2, sweeps)

    def generalists(self) -> StagePlan:
        args, parts = self.args, self.parts("train")
        strategies = self.settings.strategies
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
        pairs = largest_batch(parts, self.args.per_device_train_batch_size, packed and self.packs)
        return self.memory(True, self.args, pairs, common_beginning(parts), False, packed, **changes)

    def evaluation(self) -> StagePlan:
        """A sweep of each generalist over all held-out pairs; what base and specialists have is known by then."""
        strategies = self.settings.strategies
        return self.sweeps("evaluation", len(strategies), len(strategies), [self.parts("test")])

    def sweeps(self, name: str, runs: int, passes: int, sweeps: list[list[Lengths]]) -> StagePlan:
        """Sweeps over the pairs of some tasks each, in which so many policies are run on every pair."""
        sweeps = [parts for parts in sweeps if parts]
        if not sweeps:
            return StagePlan(name, 0, None, 0, 0, 0.0)
        size = self.args.precompute_ref_batch_size or self.args.per_device_eval_batch_size
        batches, tokens, work = [], 0, 0.0
        for parts in sweeps:
            pairs = scoring_batch(parts, size, self.packs)
            batches.append((pairs, common_beginning(parts)))
            for part in parts:
                one = self.work([part], [1.0], len(pairs))
                tokens = _sum(tokens, part.count, passes * one.tokens)
                work = _sum(work, part.count, passes * one.scoring())
        pairs, common = max(batches, key=lambda batch: _rows(batch[0], self.packs))
        # Base and specialist, or base and generalist, are two models if they are not adapters
        memory = self.memory(False, self.args, pairs, common, self.peft_config is None)
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
            for packed in ((True, False) if self.packs else (False,))
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
        return Work.of(self.products, parts, shares, batch_size, self.packs)

    @cached_property
    def plain_work(self) -> float | None:
        """The unit of cost."""
        parts = self.parts("train")
        steps = self.steps(self.args, _count(parts))
        if steps is None:
            return None
        shares = self.shares(self.args.mixing, parts)
        pair = Work.of(self.products, parts, shares, self.args.per_device_train_batch_size, packed=False, trl=True)
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
