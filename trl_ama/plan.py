"""What a run will need, stage by stage: memory on one device, steps, tokens, and cost in units of one plain DPO run.

The unit is TRL's `DPOTrainer` on the pairs that the generalist draws, as often: every pair as two padded rows, through the policy
forward and backward and through the reference forward. Cost is counted in products of matrices, which is what the time of a
training goes into; see docs/plan.md for what is left out.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from math import ceil
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig, BitsAndBytesConfig, PretrainedConfig
from trl import get_peft_config

from .ama_config import AMAConfig
from .errors import AMAError, first_line
from .memory_plan import MemorySettings, StageMemory, empty_model, optimizer_family, scoring_memory, training_memory
from .plan_cost import Products, Work
from .plan_lengths import Lengths, count_lengths, largest_batch, scoring_batch
from .prefix_support import _why_not
from .run_settings import RunSettings


_BY_SIZE = ("proportional", "task_normalized")  # strategies that draw tasks by their number of pairs


@dataclass
class StagePlan:
    """One stage: what it runs, on one device, and how long."""

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


def make_plan(settings: RunSettings, device: str = "cuda", processes: int = 1, notes: Iterable[str] = ()) -> Plan:
    """Plan a run.

    Args:
        settings ([`RunSettings`]): The parsed recipe.
        device (`str`): `"cuda"` or `"cpu"`: where it will run, whatever this machine has.
        processes (`int`): How many processes share the pairs.
        notes (`Iterable[str]`): What else to tell the user.

    Raises:
        AMAError: If configuration or tokenizer of the base model cannot be read, or the settings do not go together.
    """
    return _Planner(settings, device, processes, list(notes)).plan()


class _Planner:
    def __init__(self, settings: RunSettings, device: str, processes: int, notes: list[str]):
        self.settings, self.device, self.processes, self.notes = settings, device, processes, notes
        self.args = settings.training_args
        self.peft_config = get_peft_config(settings.model_args)
        longest = self.args.max_length
        self.lengths, found = count_lengths(settings, longest)
        self.notes += found
        self._memories: dict[Any, StageMemory] = {}

    def plan(self) -> Plan:
        stages = [self.specialists(), self.losses(), self.generalists(), self.evaluation()]
        variants = self.variants()
        first = next(stage.memory for stage in stages if stage.name == "generalists")
        if first.why_plain or self.why_plain:
            self.notes.append(f"Without the fast path or in parts unknown: {first.why_plain or self.why_plain}.")
        if optimizer_family(self.args.optim) is None:
            self.notes.append(f"The states of optim '{self.args.optim}' are not known here; taken for AdamW's.")
        if self.processes > 1:
            self.notes.append(
                f"{self.processes} processes: steps are divided among them, memory is that of each device as in DDP, without its "
                "buckets of gradients. ZeRO and FSDP spread weights, gradients and states further, which is not modelled."
            )
        steps = self.steps(self.args, _count(list(self.lengths["train"].values())))
        return Plan(self.settings.model_name, self.device, self.processes, stages, variants, steps, self.notes)

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
        try:
            return self.settings.quantization_config()
        except (ImportError, ValueError, TypeError) as error:
            raise AMAError(f"The quantisation cannot be planned: {first_line(error)} Install bitsandbytes.") from error

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
        """Why the fast path is not asked for, if it is not."""
        if self.args.prefix_sharing is False:
            return "prefix_sharing is off"
        trainer = SimpleNamespace(args=self.args, accelerator=SimpleNamespace(parallelism_config=None))
        return _why_not(trainer, self.model)

    def memory(self, trains: bool, args: AMAConfig, pairs: list, second: bool, **changes: Any) -> StageMemory:
        packed = changes.pop("packed", True) and self.why_plain is None
        settings = replace(self.memory_settings(args), **changes)
        if not trains:  # two sweeps that differ in what only a training knows are the same
            settings = replace(settings, gradient_checkpointing=False, accumulates=False)
        key = (trains, settings, tuple(pairs), second, packed)
        if key not in self._memories:
            function = training_memory if trains else scoring_memory
            self._memories[key] = function(self.config, settings, pairs, packed, second, self.args.max_length)
        return self._memories[key]

    # ---- Stages ----

    def specialists(self) -> StagePlan:
        needed = [task for task in self.settings.task_args.tasks if self.settings.needs_specialist(task.task)]
        memories, steps, tokens, work = [], 0, 0, 0.0
        largest: dict[Any, list] = {}
        for task in needed:
            args, part = self.settings.specialist_arguments(task), self.lengths["train"].get(task.task)
            if part is None:
                continue
            own = self.steps(args, part.count)
            pairs = largest_batch([part], args.per_device_train_batch_size)
            key = (self.memory_settings(args), args.precompute_ref_log_probs)
            if sum(map(sum, pairs)) > sum(map(sum, largest.get(key, ([],))[0])):
                largest[key] = (pairs, args)
            drawn = None if own is None else own * self.batch(args)
            passes = self.work([part], [1.0], args)
            steps, tokens, work = (
                _sum(steps, own),
                _sum(tokens, drawn, 2 * passes.tokens),
                _sum(work, drawn, passes.training(args.gradient_checkpointing) + passes.scoring()),
            )
        for pairs, args in largest.values():
            second = self.peft_config is None and not args.precompute_ref_log_probs
            memories.append(self.memory(True, args, pairs, second))
        return self.stage("specialists", len(needed), memories, steps, tokens, work)

    def losses(self) -> StagePlan:
        tasks = [task for task in self.settings.task_names if task not in self.settings.shared_tasks]
        parts = [split[task] for split in self.lengths.values() for task in tasks if task in split]
        return self.sweeps("reference losses", 2, parts)

    def generalists(self) -> StagePlan:
        args, parts = self.args, list(self.lengths["train"].values())
        strategies = self.settings.strategies
        count = _count(parts)
        steps, tokens, work = 0, 0, 0.0
        for strategy in strategies:
            own = self.steps(args, count)
            drawn = None if own is None else own * self.batch(args)
            passes = self.work(parts, self.shares(strategy, parts), args)
            steps, tokens, work = (
                _sum(steps, own),
                _sum(tokens, drawn, passes.tokens),
                _sum(work, drawn, passes.training(args.gradient_checkpointing)),
            )
        memory = self.memory(True, args, self.largest(), False)
        return self.stage("generalists", len(strategies), [memory], steps, tokens, work)

    def evaluation(self) -> StagePlan:
        return self.sweeps("evaluation", len(self.settings.strategies), list(self.lengths.get("test", {}).values()))

    def sweeps(self, name: str, passes: int, parts: list[Lengths]) -> StagePlan:
        if not parts:
            return StagePlan(name, 0, None, 0, 0, 0.0)
        args = self.args
        size = args.precompute_ref_batch_size or args.per_device_eval_batch_size
        pairs = scoring_batch(parts, size, self.why_plain is None)
        # Base and specialist, or base and generalist, are two models if they are not adapters
        memory = self.memory(False, args, pairs, self.peft_config is None)
        tokens, work = 0, 0.0
        for part in parts:
            one = self.work([part], [1.0], args)
            tokens, work = (
                _sum(tokens, part.count, passes * one.tokens),
                _sum(work, part.count, passes * one.scoring()),
            )
        return self.stage(name, passes, [memory], None, tokens, work)

    def stage(self, name: str, runs: int, memories: list[StageMemory], steps, tokens, work) -> StagePlan:
        memory = max(memories, key=lambda one: one.peak, default=None)
        unit = self.plain_work
        cost = None if work is None or not unit else work / unit
        return StagePlan(name, runs, memory, steps, None if tokens is None else round(tokens), cost)

    def variants(self) -> dict[str, StageMemory]:
        """The generalist's memory, with and without gradient checkpointing, packed and padded."""
        return {
            f"{'packed' if packed else 'padded'}, {'with' if checkpoints else 'without'} gradient checkpointing": self.memory(
                True, self.args, self.largest(), False, packed=packed, gradient_checkpointing=checkpoints
            )
            for packed in ((True, False) if self.why_plain is None else (False,))
            for checkpoints in (False, True)
        }

    # ---- Steps and cost ----

    def largest(self) -> list[tuple[int, int, int]]:
        return largest_batch(list(self.lengths["train"].values()), self.args.per_device_train_batch_size)

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

    def work(self, parts: list[Lengths], shares: list[float], args: AMAConfig) -> Work:
        """What a pair takes on our path, on average."""
        return Work.of(self.products, parts, shares, args.per_device_train_batch_size, self.why_plain is None)

    @cached_property
    def plain_work(self) -> float | None:
        """The unit of cost."""
        parts = list(self.lengths["train"].values())
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


def _count(parts: list[Lengths]) -> int | None:
    counts = [part.count for part in parts]
    return None if None in counts else sum(counts)
