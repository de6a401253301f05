"""What starting costs, without a clock: the modules that are imported, compared with what TRL imports itself.

Figures in milliseconds come from `tests/benchmarks/startup.py`.
"""

import os
import subprocess
import sys

import pytest
from places import ROOT


COMMANDS = ["ama", "ama-specialists", "ama-losses", "ama-eval", "ama-check"]
HEAVY = {"accelerate", "datasets", "numpy", "pandas", "peft", "pyarrow", "torch", "transformers"}
HELP = """
import contextlib, io, sys
import trl_ama_register
trl_ama_register.install()
from trl.cli import main
def help(*commands):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for command in commands:
            with contextlib.suppress(SystemExit):
                main([command, "--help"])
            assert "--learning_rate" in printed.getvalue(), command
            printed.truncate(0)
    print("modules:", *sys.modules)
help("dpo")
help(*{commands!r})
"""


def modules_after(code: str) -> set[str]:
    """The modules of a fresh Python that has run `code`."""
    return modules_during(code + "\nimport sys; print('modules:', *sys.modules)")[-1]


def modules_during(code: str) -> list[set[str]]:
    """Those of a fresh Python whenever `code` prints them."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return [set(part.split()) for part in result.stdout.split("modules:")[1:]]


def packages(modules: set[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules} - sys.stdlib_module_names


def test_import_adds_nothing_to_importing_trl():
    ours = modules_after("import trl, trl_ama")
    assert packages(ours - modules_after("import trl")) == {"trl_ama"} | ({"trl"} if "trl.ama" in ours else set())
    assert {module for module in ours if module.startswith("trl_ama.")} == set()
    assert not HEAVY & packages(ours)


@pytest.mark.parametrize(
    "module",
    ["trl_ama.cli", "trl_ama.common.errors", "trl_ama.registration", "trl_ama.tasks.config", "trl_ama_register"],
)
def test_modules_of_the_command_line_import_nothing_heavy(module):
    assert not HEAVY & packages(modules_after(f"import {module}"))


def test_list_of_commands_imports_nothing_heavy():
    code = "from trl_ama.cli import main; assert main([]) == 0"
    assert not HEAVY & packages(modules_after(code))


def test_help_of_our_commands_imports_nothing_that_help_of_dpo_does_not():
    theirs, ours = modules_during(HELP.format(commands=COMMANDS))  # one after the other
    assert "datasets" not in ours
    assert {module for module in ours - theirs if not module.startswith("trl_ama")} == {"trl.ama"} - theirs
    assert "trl_ama.registration" in ours
    # Nor, of our own, what trains
    assert (
        not {"trl_ama.dpo.ama_trainer", "trl_ama.pipeline.run", "trl_ama.tasks.pairs", "trl_ama.recipe.settings"}
        & ours
    )


def test_arguments_can_be_used_without_datasets():
    code = "from trl_ama import TaskConfig, TaskMixtureConfig; TaskMixtureConfig(tasks=['{task: a, path: b}'])"
    assert not HEAVY & packages(modules_after(code))


FOREIGN = """
class Asks:  # the rest of the finders, as tools do that watch imports
    def find_spec(self, name, path=None, target=None):
        specs = (other.find_spec(name, path, target) for other in list(sys.meta_path) if other is not self)
        return next((spec for spec in specs if spec is not None), None)
sys.meta_path.insert(0, Asks())
"""
REFUSES = """
from importlib.machinery import PathFinder
class Loader:
    __slots__ = ("inner",)
    def __init__(self, inner): self.inner = inner
    def create_module(self, spec): return None
    def exec_module(self, module): self.inner.exec_module(module)
class Refuses:
    def find_spec(self, name, path=None, target=None):
        spec = PathFinder.find_spec(name, path, target) if name == "trl" else None
        if spec is not None: spec.loader = Loader(spec.loader)
        return spec
sys.meta_path.insert(0, Refuses())
"""


@pytest.mark.parametrize(
    ("before", "registers"),
    [
        ("import trl_ama", True),
        ("import trl; import trl_ama", True),
        ("import trl_ama; del sys.modules['trl_ama']; import trl_ama", True),
        ("import trl_ama; importlib.reload(trl_ama)", True),
        ("import trl_ama; importlib.util.find_spec('trl'); importlib.util.find_spec('trl')", True),
        (f"{FOREIGN}\nimport trl_ama", True),
        (f"import trl_ama\n{FOREIGN}", True),
        (f"{REFUSES}\nimport trl_ama", False),  # but `import trl` goes on
    ],
)
def test_our_names_are_in_trl_whoever_is_imported_first(before, registers):
    code = f"import importlib, importlib.util, sys\n{before}\nimport trl, trl_ama\n"
    code += "waiting = [type(one).__name__ for one in sys.meta_path].count('_TRLAwaited')\n"
    code += (
        f"assert ('AMATrainer' in trl._class_to_module) is {registers} and waiting == {int(not registers)}, waiting"
    )
    assert "trl" in modules_after(code)


def test_a_room_shows_its_names_and_its_files():
    code = "import trl_ama.dpo.config, trl_ama.dpo; assert {'AMATrainer', 'config', '__path__'} <= {*dir(trl_ama.dpo)}"
    assert "trl_ama.dpo.ama_trainer" not in modules_after(code)
