"""What an error of a forward pass means: no memory, a broken device, or a call that the model cannot take."""

import torch
from accelerate.utils.memory import should_reduce_batch_size


FAILURES = (
    TypeError,
    ValueError,
    RuntimeError,
    KeyError,
    AttributeError,
    IndexError,
)  # of a call that a model cannot take
_NO_MEMORY = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "HIP error: out of memory")
_BROKEN = ("device-side assert", "CUDA error", "HIP error")  # of torch before it had AcceleratorError


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch might do."""
    if isinstance(error, torch.OutOfMemoryError) or (isinstance(error, Exception) and should_reduce_batch_size(error)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def says_nothing(error: BaseException) -> bool:
    """Whether an error is about the device and not about the model: it is to be raised, and never to be taken for a verdict.

    After a failed assertion on a device all that follows fails on it, whatever it is.
    """
    if is_out_of_memory(error) or isinstance(error, getattr(torch, "AcceleratorError", ())):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _BROKEN)


def as_text(error: BaseException) -> str:
    """An error's name and first line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
