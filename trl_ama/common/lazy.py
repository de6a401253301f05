"""Names of a room that are imported when they are first used: a command that needs no torch must not wait for it."""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any


def lazy_names(package: str, names: dict[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """What a package needs to have names of its files without importing these: `__getattr__`, `__dir__` and `__all__`.

    Args:
        package (`str`): Its `__name__`.
        names (`dict[str, str]`): Each name → the file, without `.py`, that defines it.
    """

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{names[name]}"), name)

    return get, lambda: sorted({*vars(sys.modules[package]), *names}), list(names)
