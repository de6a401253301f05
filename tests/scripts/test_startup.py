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
import contextlib, io
import trl_ama_register
trl_ama_register.install()
from trl.cli import main
with contextlib.redirect_stdout(io.StringIO()) as printed:
    for command in {commands!r}:
        with contextlib.suppress(SystemExit):
            main([command, "--help"])
        assert "--learning_rate" in printed.getvalue(), command
        printed.truncate(0)
"""


def modules_after(code: str) -> set[str]:
    """The modules of a fresh Python that has run `code`."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    code += "\nimport sys; print('modules:', *sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.rpartition("modules:")[2].split())


def packages(modules: set[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules} - sys.stdlib_module_names


def help_modules(*commands: str) -> set[str]:
    return modules_after(HELP.format(commands=commands))


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
    ours, theirs = help_modules(*COMMANDS), help_modules("dpo")
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
