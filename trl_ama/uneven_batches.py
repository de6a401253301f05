"""The end of an epoch on several processes, which must have batches of the same size: what of them counts.

Where the last pairs do not fill a micro-batch of every process, Accelerate (`even_batches`) repeats the epoch's first ones.
They run, because every process has to, but they do not count: then a step is that of one process with the same pairs.
"""

from typing import Any

from accelerate import Accelerator


# In a batch with repeats: how many of its pairs count, which come first, and how many do on all processes together
COUNTED = "counted_pairs"


def mark_repeats(batches: list[dict[str, Any]], accelerator: Accelerator, epoch_pairs: int | None) -> list[int]:
    """Mark the repeats in the micro-batches of an optimizer step.

    Args:
        batches (`list[dict]`): This process's micro-batches of 2B rows each, chosen ones first.
        accelerator (`Accelerator`): Knows whether the epoch ends with them.
        epoch_pairs (`int`, *optional*): Pairs of an epoch; `None` if no batch is incomplete or nobody knows.

    Returns:
        `list[int]`: Of each micro-batch, the pairs that count on all processes together. # (M,)
    """
    processes = accelerator.num_processes
    sizes = [len(batch["input_ids"]) // 2 for batch in batches]
    rounds = [size * processes for size in sizes]
    if processes > 1 and batches and epoch_pairs is not None and accelerator.gradient_state.end_of_dataloader:
        rest = epoch_pairs % rounds[-1]
        if rest:
            own = min(max(rest - accelerator.process_index * sizes[-1], 0), sizes[-1])
            batches[-1][COUNTED] = (own, rest)
            rounds[-1] = rest
    return rounds
