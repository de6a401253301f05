"""A plan as text: what fits, two tables and what to know about them."""

from .memory import GIB, StageMemory
from .plan import Plan, StagePlan


# GB of a card's name → GiB that CUDA gave out of it, as torch's out-of-memory messages quote them for cards of NVIDIA's that
# have least: RTX 3070, RTX of 12 GB, T4, A10, L40, A100
CARDS = {8: 7.78, 12: 11.60, 16: 14.56, 24: 21.99, 48: 44.40, 80: 79.14}
# What is not ours: CUDA's context, about half a GiB, and what the allocator cannot use, which grows with what it is asked for
OVERHEAD, OF_PEAK = 1.0, 0.08  # GiB and a share of the peak, whichever is more
_MEMORY = ["stage", "batch", "weights", "reference", "gradients", "optimizer", "activations", "peak", "fits"]
_WORK = ["stage", "runs", "steps", "tokens", "cost"]


def render(plan: Plan) -> str:
    """The plan as text."""
    where = "a GPU" if plan.device != "cpu" else "a CPU"
    whom = (
        f"one process on {where}"
        if plan.processes == 1
        else f"{plan.processes} processes; memory is that of each, on {where} of its own"
    )
    lines = [f"{plan.model}, planned for {whom}"]
    trained = next(
        (stage.memory for stage in plan.stages if stage.memory is not None and stage.memory.trainable), None
    )
    if trained is not None:
        lines.append(
            f"{trained.parameters:,} parameters, of which {trained.trainable:,} are trained; each training leaves "
            f"{size(trained.saved)} on disk"
        )
    peak = max(stage.memory.peak for stage in plan.stages if stage.memory is not None)
    unit, held = ("GiB", GIB) if peak >= GIB / 4 else ("MiB", 2**20)
    lines += [_verdict(plan, unit, held), "", f"Memory in {unit}, for the largest batch of each stage"]
    lines += _table(_MEMORY, [_memory_row(stage, held) for stage in plan.stages])
    lines += ["", "Work", *_table(_WORK, [*(_work_row(stage) for stage in plan.stages), _total_row(plan)])]
    if plan.plain_steps is not None:
        lines.append(
            f"Cost 1 is one run of TRL's DPOTrainer over {plan.plain_steps:,} optimizer steps of padded pairs, reference included. Tokens "
            "count once for each pass forward."
        )
    if plan.variants:
        rows = [
            [name, amount(memory.activations, held), amount(memory.peak, held), fits(memory)]
            for name, memory in plan.variants.items()
        ]
        header = [f"in {unit}", "activations", "peak", "fits"]
        lines += ["", "A generalist with other settings", *_table(header, rows)]
    notes = list(plan.notes)
    if any(stage.memory is not None and stage.memory.paged for stage in plan.stages):
        notes.append("The optimizer's states are paged: they may move to the host's memory, and are counted here.")
    return "\n".join([*lines, *(f"\nNote: {note}" for note in notes)])


def _verdict(plan: Plan, unit: str, held: int) -> str:
    """Where the whole run fits, and what decides it."""
    stages = [stage for stage in plan.stages if stage.memory is not None]
    largest = max(stages, key=lambda stage: stage.memory.peak)
    peak, card = largest.memory.peak, _card(largest.memory)
    of = "memory" if plan.device == "cpu" else "a GPU's memory"
    bound = "at least " if largest.memory.activations is None else ""
    decided = f"{bound}{amount(peak, held)} {unit} of {of} at the peak, in the stage of the {largest.name}"
    least = "It needs" if plan.processes == 1 else "Each process needs"
    if bound:
        return f"{least} {decided}; what fits is unknown."
    if card is None:
        return (
            f"{least} {decided}: more than {max(CARDS)} GB hold. Less: gradient_checkpointing, a smaller "
            "per_device_train_batch_size or max_length, use_peft, load_in_4bit."
        )
    if plan.device == "cpu":
        return f"{least} {decided}, and about {_overhead(largest.memory):.0f} GiB for Python: {card} GB hold the run."
    return f"{least} {decided}: a GPU of {card} GB holds the run."


def _memory_row(stage: StagePlan, held: int) -> list[str]:
    memory = stage.memory
    if memory is None:
        return [stage.name, *["–"] * (len(_MEMORY) - 2), "nothing to do"]
    pairs = len(memory.pairs)
    batch = f"{pairs} {'pair' if pairs == 1 else 'pairs'}, {number(memory.tokens)} tokens"
    terms = (memory.weights, memory.reference, memory.gradients, memory.optimizer, memory.activations)
    bound = "≥ " if memory.activations is None else ""
    figures = [amount(term, held) for term in terms]
    return [stage.name, batch, *figures, bound + amount(memory.peak, held), fits(memory)]


def _card(memory: StageMemory) -> int | None:
    """The smallest card that holds a stage, by the GB of its name."""
    return next((card for card, held in CARDS.items() if memory.fits(held, _overhead(memory))), None)


def _overhead(memory: StageMemory) -> float:
    """GiB that a stage needs beside its peak."""
    return max(OVERHEAD, OF_PEAK * memory.peak / GIB)


def fits(memory: StageMemory) -> str:
    """Where a stage fits, in GB as cards are named."""
    card = _card(memory)
    if card is None:
        return f"over {max(CARDS)} GB"
    return f"{card} GB and up" if memory.activations is not None else "unknown"


def _work_row(stage: StagePlan) -> list[str]:
    if stage.memory is None:
        return [stage.name, *["–"] * 4]
    steps = "–" if stage.steps is None and stage.name in ("reference losses", "evaluation") else number(stage.steps)
    return [stage.name, str(stage.runs), steps, number(stage.tokens), ratio(stage.cost)]


def _total_row(plan: Plan) -> list[str]:
    tokens = [stage.tokens for stage in plan.stages if stage.memory is not None]
    return ["all", "", "", number(None if None in tokens else sum(tokens)), ratio(plan.total_cost)]


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Rows of cells in columns: the first to the left, figures to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = [
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in cells).rstrip()
        for cells in (enumerate(zip(row, widths, strict=True)) for row in (header, *rows))
    ]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def amount(count: int | None, unit: int) -> str:
    """Bytes in units of so many bytes; `?` if unknown."""
    if count is None:
        return "?"
    return "0" if count == 0 else f"{count / unit:.2f}" if count >= unit / 100 else "<0.01"


def size(count: float) -> str:
    """Bytes as people read them: powers of 1,000, as disks and the Hub count."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def number(count: float | None) -> str:
    """A count, shortened from ten million on; `?` if unknown."""
    if count is None:
        return "?"
    return f"{count / 1e6:,.0f} M" if count >= 1e7 else f"{round(count):,}"


def ratio(value: float | None) -> str:
    """A cost; `?` if unknown."""
    return "?" if value is None else f"{value:.2f}"
