"""Errors of other libraries at a run's start, in one sentence that names the keys to look at.

Only what they raise is told anew; an error of this package's own code keeps its traceback.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import AMAError


_KINDS = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ImportError,
    RuntimeError,
    AssertionError,
    ArithmeticError,
)
# What DPOTrainer would raise stays what a caller may catch. The text of a KeyError is shown in quotes, so it is left out
_CAUGHT_BY_CALLERS = (TypeError, NotImplementedError, RuntimeError, ImportError, AttributeError, IndexError)
_PACKAGE = Path(__file__).parent.parent


@contextlib.contextmanager
def told(what: str, keys: str, explain: Callable[[Exception], str | None] | None = None) -> Iterator[None]:
    """While open, what another library refuses becomes an [`AMAError`], which is also of the kind that was raised.

    Args:
        what (`str`): What cannot be done, e.g. `"The adapter cannot be put on the model"`.
        keys (`str`): The keys to look at, e.g. `"the lora_* keys (peft_config)"`.
        explain (`Callable`, *optional*): Says more about an error that it knows: a sentence in place of
            `keys`, empty if the error says it all.
    """
    try:
        yield
    except AMAError:
        raise
    except _KINDS as error:
        if isinstance(error, OSError) or type(error).__name__ == "OutOfMemoryError" or _is_ours(error):
            raise
        said = " ".join(str(error).split()).rstrip(".:; ") or "no reason is given"
        said = said if isinstance(error, ValueError) else f"{type(error).__name__}: {said}"
        fix = explain(error) if explain is not None else None
        fix = f" Look at {keys}." if fix is None else f" {fix}".rstrip()
        raise _kind_of(error)(f"{what}: {said}.{fix}") from error


def _is_ours(error: Exception) -> bool:
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return Path(trace.tb_frame.f_code.co_filename).is_relative_to(_PACKAGE)


def _kind_of(error: Exception) -> type[AMAError]:
    return next((_told_as(kind) for kind in _CAUGHT_BY_CALLERS if isinstance(error, kind)), AMAError)


@functools.cache
def _told_as(kind: type[Exception]) -> type[AMAError]:
    return type(AMAError.__name__, (AMAError, kind), {"__module__": AMAError.__module__, "__doc__": AMAError.__doc__})
