"""The parts of `make gpu`, most valuable first, and what each of them is the first to run. Imports nothing heavy."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One part, in a process of its own.

    Args:
        title (`str`): What it measures.
        seconds (`int`): What it may take; together 8 minutes, if each takes all of it.
        function (`str`): `module.function` of this folder, called with the report and `arguments`.
        arguments (`tuple`): For it.
        first (`str`): What runs nowhere but on a card, and here.
        launched (`bool`): Whether `accelerate launch` starts it.
    """

    title: str
    seconds: int
    function: str
    first: str
    arguments: tuple[str, ...] = ()
    launched: bool = False


_STEPS = "steps and peak memory against `DPOTrainer`"
PARTS = {
    "env": Part("versions, card and its ceilings", 20, "gpu_card.environment", "nothing of ours"),
    "attention": Part(
        "attention of one layer, kernel by kernel",
        40,
        "gpu_kernels.attention",
        "attention of a packed row by torch's kernels for CUDA: grouped heads, masks, a new shape in every block",
    ),
    "exact": Part(
        "log-probs and gradients of the fast path against float32",
        35,
        "gpu_exact.exact",
        "the fast path with TRL's Triton head; its trial and proof in 16 bits on a card",
    ),
    "steps-135M": Part(f"{_STEPS}, 135M", 40, "gpu_steps.steps", "LoRA in bf16 on a card", ("135M",)),
    "steps-1B": Part(f"{_STEPS}, 1B", 45, "gpu_steps.steps", "LoRA in bf16 where matrix products count most", ("1B",)),
    "steps-8B": Part(
        f"{_STEPS}, 8B in NF4",
        75,
        "gpu_steps.steps",
        "QLoRA by bitsandbytes' kernels for CUDA, paged optimizer states",
        ("8B",),
    ),
    "scoring": Part("scoring against `DPOTrainer`'s precomputation", 25, "gpu_steps.scoring", "scoring on a card"),
    "memory": Part(
        "planned against measured memory",
        35,
        "gpu_memory.memory",
        "nothing of ours on the card; it holds the plan to the steps above",
    ),
    "resume": Part(
        "a resumed run against an undisturbed one, bit by bit",
        25,
        "gpu_runs.resume",
        "`full_determinism`; random numbers of CUDA in a checkpoint",
    ),
    "fsdp": Part(
        "FSDP2 in one process",
        25,
        "gpu_runs.fsdp",
        "sharded models, their saving and resuming",
        launched=True,
    ),
    "quickstart": Part("all stages of the quickstart", 35, "gpu_runs.quickstart", "the whole pipeline on a card"),
    "waits": Part(
        "host waits and kernel launches of a step", 25, "gpu_runs.waits", "nothing more; it counts what the above cost"
    ),
    "tests": Part(
        "`tests/gpu`", 55, "gpu_runs.card_tests", "architectures other than Llama, full fine-tuning and fp16 on a card"
    ),
}
LIMIT = 480  # seconds for all of them
