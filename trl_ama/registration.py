"""Add the commands of trl-ama to the stock `trl` command.

TRL has no plug-in point: `trl.cli.commands.get_commands` returns a list written into its source. So `trl_ama_register.py`,
which Python calls when it starts as `trl` and at no other time, puts a finder on `sys.meta_path` that comes here once
`trl.cli.commands` is imported. `docs/startup.md` says how and when. A TRL that reads the entry points `trl.commands` needs
none of it, and finds the same commands there.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def find_commands(
    finder: Any, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
) -> ModuleSpec | None:
    """Find the module `name` as Python would without `finder`, and have its `get_commands` wrapped once it is loaded."""
    # One shot: nothing of the hook stays on `sys.meta_path` once it has done its work.
    sys.meta_path[:] = [other for other in sys.meta_path if other is not finder]
    for other in list(sys.meta_path):
        spec = other.find_spec(name, path, target)
        if spec is not None:
            _call_after_exec(spec.loader, wrap_get_commands)
            return spec
    return None


def _call_after_exec(loader: Any, callback: Callable[[ModuleType], None]) -> None:
    """Shadow `exec_module` on the instance, so that `module.__loader__` is still the real loader."""
    exec_module = loader.exec_module

    def exec_and_call_back(module: ModuleType) -> None:
        exec_module(module)
        callback(module)

    loader.exec_module = exec_and_call_back


def wrap_get_commands(module: ModuleType) -> None:
    """Make `module.get_commands` return our commands too; a TRL without that function is left as it is."""
    get_commands = getattr(module, "get_commands", None)
    if not callable(get_commands):
        return

    def get_commands_with_ama(*args, **kwargs):
        commands = get_commands(*args, **kwargs)
        try:
            from trl_ama.cli import get_commands as get_ama_commands

            # A TRL that has a command of the same name keeps it: argparse refuses a name twice.
            taken = {command.name for command in commands}
            return [*commands, *(command for command in get_ama_commands() if command.name not in taken)]
        except Exception:  # whatever TRL has changed, `trl` must go on working without us
            return commands

    module.get_commands = get_commands_with_ama
