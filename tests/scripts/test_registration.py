"""The start-up hook as part of the package: what it adds to `trl`, what it costs every other process, and how it goes away.

The package is built and installed into a bare environment that borrows torch and TRL from the one that runs the tests.
"""

import json
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from bare_environment import HOOK, Environment
from places import ROOT

from trl_ama import cli


COMMANDS = list(cli.COMMANDS)
BY_VERSION = ["trl_ama_register"] if sys.version_info >= (3, 15) else []  # PEP 829 knows no condition


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    result = subprocess.run([*command, str(ROOT)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("installed") / "env")
    environment.install(str(wheel))
    return environment


def test_wheel_has_hook_at_its_root_and_the_package_data(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {*HOOK, "trl_ama/py.typed", "trl_ama/registration.py"} <= names
    data = [
        path
        for path in (ROOT / "trl_ama").rglob("*")
        if path.suffix in (".md", ".html", ".css", ".js", ".json", ".yaml", ".py")
    ]
    assert {path.relative_to(ROOT).as_posix() for path in data} <= names


def test_trl_lists_our_commands_after_its_own(installed):
    commands = installed.trl_commands()
    assert commands[-len(COMMANDS) :] == COMMANDS
    assert "dpo" in commands
    assert len(commands) == len({*commands})


def test_trl_as_a_module_lists_them_too(installed):
    assert installed.trl_commands(installed.python, "-m", "trl.cli.main") == installed.trl_commands()


@pytest.mark.parametrize("value, listed", [("1", False), ("yes", False), ("", True), ("0", True)])
def test_switch(installed, value, listed):
    assert (set(COMMANDS) <= set(installed.trl_commands(TRL_AMA_NO_HOOK=value))) == listed


def test_what_is_not_trl_lists_what_trl_has(installed):
    code = "from trl.cli import main; raise SystemExit(main(['--help']))"
    commands = installed.trl_commands(installed.python, "-c", code)
    assert "dpo" in commands
    assert not set(COMMANDS) & set(commands)


def test_the_list_does_not_import_torch(installed):
    code = "import trl_ama_register as r, sys; r.install(); from trl.cli.commands import get_commands as g; "
    code += "print(len(g()), 'torch' in sys.modules)"
    count, torch_imported = installed.run("-c", code).stdout.split()
    assert int(count) > len(COMMANDS)
    assert torch_imported == "False"


def test_hook_leaves_nothing_on_the_meta_path_once_used(installed):
    code = "import trl_ama_register as r, sys; r.install(); f = lambda: [type(x).__name__ for x in sys.meta_path]; "
    code += "print(f()); import trl.cli; print(f()); r.install(); print(f())"
    before, after, again = installed.run("-c", code).stdout.splitlines()
    assert "TRLAMAFinder" in before
    assert "TRLAMAFinder" not in after + again


def test_start_up_imports_nothing(tmp_path, wheel):
    environment = Environment(tmp_path / "env", borrow=False)
    code = "import json, sys; print(json.dumps(sorted(sys.modules)))"
    before = json.loads(environment.run("-c", code).stdout)
    environment.install(str(wheel))
    after = json.loads(environment.run("-c", code).stdout)
    assert [module for module in after if module.startswith("trl")] == BY_VERSION
    assert BY_VERSION or after == before


def test_start_up_costs_less_than_two_milliseconds(installed):
    hook = installed.site_packages / "trl_ama_register.pth"
    code = f"import time; line = open({str(hook)!r}).read(); t = time.perf_counter(); exec(line); "
    code += "print(time.perf_counter() - t)"
    # Measured inside, each time in a fresh interpreter: the noise of starting one is larger than the bound.
    assert statistics.median(float(installed.run("-c", code).stdout) for _ in range(9)) < 2e-3


def test_entry_points_give_the_commands(installed):
    """For a TRL that reads them; with the hook they are still listed once."""
    code = "import json; from importlib.metadata import entry_points as e; found = e(group='trl.commands'); "
    code += "from trl.cli.commands.base import Command; commands = [c for p in found for c in p.load()()]; "
    code += "assert all(isinstance(c, Command) for c in commands); print(json.dumps([c.name for c in commands]))"
    assert json.loads(installed.run("-c", code).stdout) == COMMANDS


def test_trl_that_reads_the_entry_points_lists_each_once(installed, tmp_path):
    commands = "from importlib.metadata import entry_points\nfrom .base import Command\n"
    commands += "def get_commands():\n    return [c for p in entry_points(group='trl.commands') for c in p.load()()]\n"
    main = "def main():\n    from .commands import get_commands\n    print([c.name for c in get_commands()])\n"
    write_trl(tmp_path, commands, main)
    for environ in ({}, {"TRL_AMA_NO_HOOK": "1"}):
        result = installed.execute(installed.trl, PYTHONPATH=str(tmp_path), **environ)
        assert result.stdout.strip() == str(COMMANDS), result.stderr


@pytest.mark.parametrize("module", ["__init__", "registration", "cli"])
def test_broken_package_breaks_neither_python_nor_trl(installed, tmp_path, module):
    package = tmp_path / "trl_ama"
    package.mkdir()
    (package / "__init__.py").write_text("")
    if module == "cli":
        (package / "registration.py").write_text((ROOT / "trl_ama" / "registration.py").read_text())
    (package / f"{module}.py").write_text("raise RuntimeError('broken on purpose')\n")

    result = installed.run("-c", "print('started')", PYTHONPATH=str(tmp_path))
    assert (result.stdout, result.stderr) == ("started\n", "")
    commands = installed.trl_commands(PYTHONPATH=str(tmp_path))
    assert "dpo" in commands
    assert "ama" not in commands


def write_trl(folder: Path, commands: str, main: str) -> None:
    """A package `trl` of another shape."""
    base = (
        "class Command:\n    def __init__(self, name, help_text):\n        self.name = name\nCommandContext = None\n"
    )
    files = {"": "", "cli": main, "cli/commands": commands}
    for path, source in files.items():
        (folder / "trl" / path).mkdir(exist_ok=True)
        (folder / "trl" / path / "__init__.py").write_text(source)
    (folder / "trl/cli/commands/base.py").write_text(base)


@pytest.mark.parametrize("source", ["", "get_commands = None\n"])
def test_trl_of_another_shape_is_left_alone(installed, tmp_path, source):
    write_trl(
        tmp_path, source, "from . import commands as c\nmain = lambda: print(getattr(c, 'get_commands', None))\n"
    )
    result = installed.execute(installed.trl, PYTHONPATH=str(tmp_path))
    assert (result.stdout, result.stderr) == ("None\n", "")


def test_command_that_trl_already_has_is_not_replaced(installed, tmp_path):
    commands = "from .base import Command\ndef get_commands():\n    return [Command('ama', 'theirs')]\n"
    main = "from .commands import get_commands\n"
    main += "def main():\n    print([(type(c).__name__, c.name) for c in get_commands()])\n"
    write_trl(tmp_path, commands, main)
    result = installed.execute(installed.trl, PYTHONPATH=str(tmp_path))
    expected = [("Command", "ama"), *(("AMACommand", name) for name in COMMANDS[1:])]
    assert result.stdout.strip() == str(expected), result.stderr


@pytest.mark.parametrize("editable", [False, True])
def test_uninstall_takes_the_hook_away(wheel, tmp_path, editable):
    environment = Environment(tmp_path / "env")
    environment.install(*(["-e", str(ROOT)] if editable else [str(wheel)]))
    assert set(COMMANDS) <= set(environment.trl_commands())
    for name in HOOK:
        assert (environment.site_packages / name).read_bytes() == (ROOT / name).read_bytes()

    environment.pip("uninstall", "-q", "-y", "trl-ama")
    assert not list(environment.site_packages.glob("*trl_ama*"))
    assert not set(COMMANDS) & set(environment.trl_commands())
