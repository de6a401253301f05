"""SIGTERM and Ctrl-C: what is under way is saved, and the process leaves with a code that says "run me again".

A signal only asks while a section is open that leaves by itself (a training, at the end of a step; a scoring, after a batch),
and ends the process at once everywhere else, which costs nothing there. A second Ctrl-C stops at once in any case.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from accelerate import Accelerator

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: "try again"
AGAIN = "Run the same command again to go on."
NOTE = "TRL_AMA_EXIT_CODE_FILE"  # environment variable of launched processes, see `_note`
_ONE_PRESS = 0.3  # seconds; a launcher may pass on what the terminal has sent to the process, too


class Interrupted(SystemExit):
    """A signal ended the work, which can be continued. Uncaught, it ends the process with exit code 75.

    Args:
        message (`str`): What was saved and how to go on.
    """

    def __init__(self, message: str):
        super().__init__(EXIT_CODE)
        self.message = message

    def __str__(self) -> str:
        return self.message


class _State:
    """Of this process, as its signal handlers are."""

    def __init__(self):
        self.process = os.getpid()
        self.sections = 0
        self.before: dict[int, Any] = {}  # signal → the handler that ours has replaced
        self.forget()

    def forget(self) -> None:
        self.asked: signal.Signals | None = None
        self.presses = 0
        self.pressed_at = 0.0


_state = _State()


@contextlib.contextmanager
def caught(enabled: bool = True) -> Iterator[None]:
    """While open, SIGTERM and Ctrl-C are handled here; only in the main thread, and only those that nobody else handles.

    Args:
        enabled (`bool`): If not, they do what they do without us.
    """
    if not enabled:
        _release()
    if not enabled or _state.before or threading.current_thread() is not threading.main_thread():
        yield
        return
    _state.__init__()
    for number, default in ((signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        if signal.getsignal(number) is default:
            _state.before[number] = signal.signal(number, _handle)
    try:
        yield
    except SystemExit as error:
        _note(error.code)
        raise
    finally:
        _release()


def _note(code: Any) -> None:
    """Tell the command how the first of its processes has left: torch's launcher, when it was sent a signal, does not."""
    if NOTE in os.environ and os.environ.get("LOCAL_RANK", "0") == "0" and os.getpid() == _state.process:
        with contextlib.suppress(OSError):  # a full disk
            with open(os.environ[NOTE], "w") as file:
                file.write(str(code))


def _release() -> None:
    for number, handler in _state.before.items():
        signal.signal(number, handler)
    _state.before = {}
    _state.forget()


@contextlib.contextmanager
def finishing() -> Iterator[None]:
    """While open, a signal only asks: the code inside looks at `asked` and calls `leave` when all is saved."""
    _state.sections += 1
    try:
        yield
    finally:
        _state.sections -= 1
    if _state.sections == 0 and _state.asked is not None:
        leave("what was under way is finished")


def asked(accelerator: "Accelerator | None" = None) -> bool:
    """Whether a signal asks to leave; with several processes the answer is the same on all, which then must all ask."""
    ours = _state.asked is not None
    if accelerator is None or accelerator.num_processes == 1:
        return ours
    import torch  # here, because the commands, which must start at once, import this file

    return bool(accelerator.reduce(torch.tensor(float(ours), device=accelerator.device), reduction="sum").item() > 0)


def leave(done: str, how: str = AGAIN, number: int | None = None) -> None:
    """Say what was saved, in one line, and raise `Interrupted`.

    Args:
        done (`str`): What was saved, without a full stop.
        how (`str`): How to go on, as a sentence.
        number (`int`, *optional*): The signal, if it was not handled here.
    """
    name = signal.Signals(number or _state.asked or signal.SIGTERM).name
    message = f"Interrupted by {'Ctrl-C' if name == 'SIGINT' else name}: {done}. {how}"
    _say(message)
    raise Interrupted(message)


def _handle(number: int, frame: Any) -> None:
    if os.getpid() != _state.process:
        _handle_in_child(number)
        return
    pressed = number == signal.SIGINT or (
        # What torch's launcher of several processes makes of the second Ctrl-C
        number == signal.SIGTERM and _state.presses == 1 and "TORCHELASTIC_RUN_ID" in os.environ
    )
    if pressed and time.monotonic() - _state.pressed_at > _ONE_PRESS:
        _state.presses, _state.pressed_at = _state.presses + 1, time.monotonic()
        if _state.presses > 1:
            raise KeyboardInterrupt
    if _state.asked is not None:
        return
    _state.asked = signal.Signals(number)
    if _state.sections == 0:
        leave("what was finished before is kept")
    again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
    _say(f"{_state.asked.name}: saving after this step{again}.")


def _handle_in_child(number: int) -> None:
    """A process that was forked while we handle signals has our handlers, too."""
    torch_data = sys.modules.get("torch.utils.data")
    if number == signal.SIGINT and torch_data is not None and torch_data.get_worker_info() is not None:
        return  # a data loader's, which a terminal tells as well; it has to go on until the step is over
    signal.signal(number, _state.before.get(number, signal.SIG_DFL))
    signal.raise_signal(number)


class OutlivingWorker:
    """A `worker_init_fn` of a data loader whose processes outlive one SIGTERM while signals are handled here: one that goes to
    the whole group of processes would otherwise end them before the step is over, and with them the training.

    Args:
        inner (`Callable`, *optional*): The loader's own.
    """

    def __init__(self, inner: Callable[[int], None] | None):
        self._inner = inner

    def __call__(self, worker: int) -> None:
        if self._inner is not None:
            self._inner(worker)
        if signal.SIGTERM in _state.before:  # as it was when this process was forked
            signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


def _say(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"{message}\n".encode())  # `print` may be in the middle of something when a signal comes
