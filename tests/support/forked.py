"""A process of its own that need not import everything anew: forked off this one, where torch and the rest are already.

For what neither trains nor asks the Hub: threads, of autograd as of the server, are not in it.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


def run_forked(function: Callable[[], object], output: Path, seconds: int = 300) -> int:
    """Run a function in a process, which a test may kill. Returns what `subprocess` calls the return code.

    Args:
        function (`Callable`): What it runs; it sees this process as it is, and whatever it changes here stays there.
        output (`Path`): File for what it prints.
        seconds (`int`): After which it is ended by SIGALRM.
    """
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    code = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout = sys.stderr = open(1, "w", closefd=False, buffering=1)
        function()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)  # nothing of what ends the tests happens here
