"""Several processes: what one of them does for all, and sums over them that do not depend on the backend.

An error in what one process does for all is raised on every process, so that none waits for ever for the one that is gone.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers.integrations import deepspeed

from .errors import AMAError, first_line


Result = TypeVar("Result")
_SHARDED = {"FSDP", "DEEPSPEED", "MEGATRON_LM", "TP", "XLA"}


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether a forward pass may need all processes at the same time."""
    return str(getattr(accelerator, "distributed_type", "NO")).split(".")[-1] in _SHARDED


def from_main(function: Callable[[], Result]) -> Result:
    """What `function` returns on the main process, on every process; it is called on no other.

    Raises:
        AMAError: On every process, if the main process raised it; if that raised anything else, on all other processes.
    """
    state = PartialState()
    if state.num_processes == 1:
        return function()
    if not state.is_main_process:
        return _heard()
    try:
        result = function()
    except Exception as error:
        _tell(_as_text(error), None)
        raise
    _tell(None, result)
    return result


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """The main process runs the block, then the others do, who find what it left in caches. Errors are as in `from_main`."""
    state = PartialState()
    if state.num_processes == 1:
        yield
        return
    if not state.is_main_process:
        _heard()
        yield
        return
    try:
        yield
    except Exception as error:
        _tell(_as_text(error), None)
        raise
    _tell(None, None)


@contextlib.contextmanager
def whole_models() -> Iterator[None]:
    """A model that is loaded inside is whole on every process, also in a run that shares models out (FSDP, ZeRO-3)."""
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"  # by which all processes but one load nothing
    before, config = os.environ.get(name), deepspeed._hf_deepspeed_config_weak_ref
    if before is not None:
        os.environ[name] = "false"
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config
        if before is not None:
            os.environ[name] = before


def _as_text(error: Exception) -> str:
    if isinstance(error, AMAError):
        return str(error)
    return f"The main process stopped with {type(error).__name__}: {first_line(error)}"


def _tell(problem: str | None, result: Any) -> None:
    broadcast_object_list([problem, result])


def _heard() -> Any:
    problem, result = broadcast_object_list([None, None])
    if problem is not None:
        raise AMAError(problem)
    return result


def of_all(value: Any) -> list[Any]:
    """Each process's value, on every process, in their order."""
    return gather_object([value]) if PartialState().num_processes > 1 else [value]


def sum_of_all(accelerator: Accelerator, values: np.ndarray) -> np.ndarray:
    """The sum of each process's float64 `values`, bit by bit the same on every process.

    The bytes are gathered, which every backend can do, whether it knows float64 or not, and added in the processes' order.
    """
    if accelerator.num_processes == 1:
        return values
    own = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64).reshape(-1).view(np.uint8))
    everyone = accelerator.gather(own.to(accelerator.device)).cpu().numpy().view(np.float64)
    return everyone.reshape(-1, *values.shape).sum(axis=0)
