"""Which tests `make quick` leaves out: those that train, found from what they call, and those that took long, as `make slow` notes."""

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import pytest
from places import SUPPORT, TESTS


# What a test that trains, runs a pipeline or starts another Python says, itself or in what it uses
_DEAR = {"train", "run_pipeline", "executable", "make_run"}
SLOW = SUPPORT / "slow_tests.txt"  # names without parameters, one a line
SECONDS = 0.5  # of the longest of its parameters


def trains(item: pytest.Function) -> bool:
    """Whether a test, one of its fixtures, or a function or class in `tests/` that these name, says one of `_DEAR`."""
    fixtures = item._fixtureinfo.name2fixturedefs.values()
    todo: list[Any] = [item.function, *(one.func for definitions in fixtures for one in definitions)]
    seen = set()
    while todo:
        function = inspect.unwrap(todo.pop())
        if inspect.isclass(function):
            todo.extend(filter(inspect.isfunction, vars(function).values()))
        elif _is_ours(function) and function not in seen:
            seen.add(function)
            names = {name for code in _codes(function.__code__) for name in code.co_names}
            if names & _DEAR:
                return True
            todo.extend(_used(function, names))
    return False


def _used(function: Callable[..., Any], names: set[str]) -> Iterator[Callable[..., Any]]:
    """Functions and classes in `tests/` of these names: of the function's module, and of modules that it names."""
    known = function.__globals__
    modules = [known[name] for name in names if inspect.ismodule(known.get(name))]
    for place in (known, *(vars(module) for module in modules)):
        yield from (place[name] for name in names if name in place and _is_ours(place[name]))


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code and that of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _is_ours(value: Any) -> bool:
    if inspect.isclass(value):
        return any(map(_is_ours, filter(inspect.isfunction, vars(value).values())))
    return inspect.isfunction(value) and value.__code__.co_filename.startswith(str(TESTS))


class SlowNoted:
    """A plugin that notes in `SLOW` which of the tests of this run, the whole of them, took more than `SECONDS`."""

    def __init__(self):
        self._seconds: dict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[report.nodeid] += report.duration

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if exitstatus == 0:
            names = {name.partition("[")[0] for name, seconds in self._seconds.items() if seconds > SECONDS}
            SLOW.write_text("".join(f"{name}\n" for name in sorted(names)))


def noted_slow() -> frozenset[str]:
    """The names in `SLOW`."""
    return frozenset(SLOW.read_text().split())
