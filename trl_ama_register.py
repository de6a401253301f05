"""The start-up hook of trl-ama: adds its commands to the program `trl`, and does nothing in every other process.

TRL has no place for plug-ins. So Python calls `register` when it starts: up to 3.14 by the line in `trl_ama_register.pth`,
which imports this module in a process of `trl` only, from 3.15 on by `trl_ama_register.start`, which knows no condition
(PEP 829). The three files lie in site-packages; `docs/startup.md` shows them, with their hashes and how to remove them.
"""

import os
import sys


# What Python is asked to run when somebody calls `trl`: its script, on Windows an .exe or conda's script, or `-m`.
PROGRAMS = ("trl", "trl.exe", "trl-script.py", "trl.cli", "trl.cli.main")


class TRLAMAFinder:
    """Waits on `sys.meta_path` for `trl.cli.commands` to be imported; goes away by then."""

    def find_spec(self, name, path=None, target=None):
        if name != "trl.cli.commands":
            return None
        try:
            from trl_ama.registration import find_commands

            return find_commands(self, name, path, target)
        except Exception:  # `trl` must go on working without us
            return None


def register() -> None:
    """Add the commands, if this process runs `trl` and `TRL_AMA_NO_HOOK` is not set."""
    if is_trl() and os.environ.get("TRL_AMA_NO_HOOK", "0") in ("", "0"):
        install()


def is_trl() -> bool:
    """Whether Python was asked to run `trl`; the same test as in `trl_ama_register.pth`."""
    # `sys.argv` is the program and its arguments; as many at the end of `sys.orig_argv` begin with the program's name, also
    # with `-m`. Slices, because both may be empty where Python is embedded.
    program = "".join(sys.orig_argv[-len(sys.argv) :][:1])
    return os.path.basename(program).lower() in PROGRAMS


def install() -> None:
    """Add the commands once `trl.cli.commands` is imported. Nothing is done twice."""
    waits = any(isinstance(finder, TRLAMAFinder) for finder in sys.meta_path)
    if not waits and "trl.cli.commands" not in sys.modules:
        # First, because Python's own finder answers for every module on the path.
        sys.meta_path.insert(0, TRLAMAFinder())
