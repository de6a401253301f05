"""A plan as text: two tables and what to know about them."""

from .memory_plan import GIB, StageMemory
from .plan import Plan, StagePlan


CARDS = (12, 16, 24, 48, 80)  # GiB
OVERHEAD = 1.0  # GiB of a card that are not ours: CUDA's context, about a half, and what the allocator cannot use


def render(plan: Plan) -> str:
    """The plan as text."""
    where = "on a GPU" if plan.device != "cpu" else "on a CPU"
    lines = [f"{plan.model}, planned for one process {where}" if plan.processes == 1 else ""]
    if plan.processes > 1:
        lines = [f"{plan.model}, planned for {plan.processes} processes, figures of one of them {where}"]
    trained = next(
        (stage.memory for stage in plan.stages if stage.memory is not None and stage.memory.trainable), None
    )
    if trained is not None:
        lines.append(
            f"{trained.parameters:,} parameters, of which {trained.trainable:,} are trained; each training leaves "
            f"{size(trained.saved)} on disk"
        )
    lines += ["", "Memory, GiB", *_table(_MEMORY, [_memory_row(stage, plan.device) for stage in plan.stages])]
    lines += ["", "Work", *_table(_WORK, [*(_work_row(stage) for stage in plan.stages), _total_row(plan)])]
    if plan.plain_steps is not None:
        lines.append(
            f"Cost 1 is a plain DPO run of TRL's over {plan.plain_steps:,} steps of padded pairs, reference included."
        )
    if plan.variants:
        rows = [
            [name, gib(memory.activations), gib(memory.peak), _fits(memory, plan.device)]
            for name, memory in plan.variants.items()
        ]
        lines += ["", "The generalist otherwise", *_table(["", "activations", "peak", "fits"], rows)]
    notes = list(plan.notes)
    if any(stage.memory is not None and stage.memory.paged for stage in plan.stages):
        notes.append("The optimizer's states are paged: they may move to the host's memory, and are counted here.")
    return "\n".join([*lines, *(f"\nNote: {note}" for note in notes)])


_MEMORY = ["stage", "weights", "reference", "gradients", "optimizer", "activations", "peak", "fits"]
_WORK = ["stage", "runs", "steps", "tokens", "cost"]


def _memory_row(stage: StagePlan, device: str) -> list[str]:
    memory = stage.memory
    if memory is None:
        return [stage.name, *["–"] * 6, "nothing to do"]
    terms = (memory.weights, memory.reference, memory.gradients, memory.optimizer, memory.activations)
    bound = "≥ " if memory.activations is None else ""
    return [stage.name, *map(gib, terms), bound + gib(memory.peak), _fits(memory, device)]


def _fits(memory: StageMemory, device: str) -> str:
    """The smallest card that holds a stage."""
    overhead = OVERHEAD if device != "cpu" else 0.0
    card = next((card for card in CARDS if memory.fits(card, overhead)), None)
    return f"none of {CARDS[-1]}" if card is None else f"{card} and up"


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


def gib(count: int | None) -> str:
    """Bytes in GiB; `?` if unknown."""
    return "?" if count is None else "0" if count == 0 else f"{count / GIB:.2f}" if count >= GIB / 100 else "<0.01"


def size(count: int) -> str:
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
