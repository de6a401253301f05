"""What the evaluation found on every held-out pair, kept for the run's page: the means in `results.json` hide the pairs."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import PartialState
from datasets import Dataset

from ..reference_losses.columns import REFERENCE_COLUMNS
from ..tasks.pairs import PAIR_ID_COLUMN, TASK_COLUMN


def save_margins(
    path: Path, task_names: list[str], beta: float, pairs: Dataset, logps: dict[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    """Write the reward margin of every held-out pair under every policy; on the main process.

    Args:
        path (`Path`): The file.
        task_names (`list[str]`): Names of the task numbers.
        beta (`float`): Of the reward.
        pairs (`Dataset`): The held-out pairs with `task` numbers, `pair_id` and the reference's log-probs. # N rows
        logps (`dict`): Name of a policy → log-probs of chosen and rejected completions. # (N,) each
    """
    if not PartialState().is_main_process:
        return
    chosen, rejected = (np.asarray(pairs[column][:], dtype=np.float32) for column in REFERENCE_COLUMNS)
    margins = {
        name: beta * ((np.asarray(own[0]) - chosen) - (np.asarray(own[1]) - rejected)) for name, own in logps.items()
    }
    tasks = [task_names[number] for number in pairs[TASK_COLUMN][:]]
    write_margins(path, tasks, list(pairs[PAIR_ID_COLUMN][:]), margins)


def write_margins(path: Path, tasks: list[str], pair_ids: list[str], margins: dict[str, np.ndarray]) -> None:
    """Write a table of `task`, `pair_id` and a column of margins per policy, whole or not at all."""
    columns = {name: np.asarray(values, dtype=np.float32) for name, values in margins.items()}
    table = pa.table({"task": tasks, "pair_id": pair_ids, **columns})
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    pq.write_table(table, partial)
    partial.replace(path)
