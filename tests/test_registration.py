"""The start-up hook: what it adds to `trl`, what it costs every other process, and how it goes away.

The package is built and installed into a bare environment that borrows torch and TRL from the one that runs the tests.
"""

import os
import statistics
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from trl_ama import cli


REPO = Path(__file__).resolve().parents[1]
COMMANDS = list(cli.COMMANDS)
TRL_HELP = ["-c", "from trl.cli import main; raise SystemExit(main(['--help']))"]


class Environment:
    """A bare environment; `borrow` puts the packages of the running one on its path, without their `.pth` files."""

    def __init__(self, path: Path, borrow: bool = True):
        venv.create(path, with_pip=False, symlinks=True)
        self.python = str(path / "bin" / "python")
        self.site_packages = next((path / "lib").glob("python*/site-packages"))
        self.path = path
        if borrow:
            (self.site_packages / "zz_borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")

    def run(self, *args: str, **environ: str) -> subprocess.CompletedProcess:
        """Run python away from the repository, so that only what is installed is found."""
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | environ
        return subprocess.run([self.python, *args], cwd=self.path, env=env, capture_output=True, text=True, timeout=60)

    def pip(self, *args: str) -> None:
        command = [sys.executable, "-m", "pip", "--python", self.python, *args]
        result = subprocess.run(command, cwd=self.path, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr

    def install(self, *what: str) -> None:
        self.pip("install", "-q", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", *what)

    def trl_commands(self, **environ: str) -> list[str]:
        result = self.run(*TRL_HELP, **environ)
        assert result.returncode == 0, result.stderr
        names = result.stdout[result.stdout.index("{") + 1 : result.stdout.index("}")]
        return names.split(",")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    result = subprocess.run([*command, str(REPO)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("installed") / "env")
    environment.install(str(wheel))
    return environment


def test_wheel_has_hook_at_its_root_and_the_package_data(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"trl_ama_register.pth", "trl_ama/py.typed", "trl_ama/registration.py"} <= names
    data = [
        path
        for path in (REPO / "trl_ama").rglob("*")
        if path.suffix in (".md", ".html", ".css", ".js", ".json", ".yaml", ".py")
    ]
    assert {path.relative_to(REPO).as_posix() for path in data} <= names


def test_trl_lists_our_commands_after_its_own(installed):
    commands = installed.trl_commands()
    assert commands[-len(COMMANDS) :] == COMMANDS
    assert "dpo" in commands


def test_the_list_does_not_import_torch(installed):
    code = "import sys; from trl.cli.commands import get_commands as g; print(len(g()), 'torch' in sys.modules)"
    count, torch_imported = installed.run("-c", code).stdout.split()
    assert int(count) > len(COMMANDS)
    assert torch_imported == "False"


def test_hook_leaves_nothing_on_the_meta_path_once_used(installed):
    code = "import sys; f = lambda: [type(x).__name__ for x in sys.meta_path]; print(f()); import trl.cli; print(f())"
    before, after = installed.run("-c", code).stdout.splitlines()
    assert "TRLAMAFinder" in before
    assert "TRLAMAFinder" not in after


def test_start_up_imports_nothing(tmp_path, wheel):
    environment = Environment(tmp_path / "env", borrow=False)
    code = "import sys; print(sorted(sys.modules))"
    before = environment.run("-c", code).stdout
    environment.install(str(wheel))
    assert environment.run("-c", code).stdout == before


def test_start_up_costs_less_than_two_milliseconds(installed):
    hook = installed.site_packages / "trl_ama_register.pth"
    code = f"import time; line = open({str(hook)!r}).read(); t = time.perf_counter(); exec(line); "
    code += "print(time.perf_counter() - t)"
    # Measured inside, each time in a fresh interpreter: the noise of starting one is larger than the bound.
    assert statistics.median(float(installed.run("-c", code).stdout) for _ in range(9)) < 2e-3


@pytest.mark.parametrize("module", ["__init__", "registration", "cli"])
def test_broken_package_breaks_neither_python_nor_trl(installed, tmp_path, module):
    package = tmp_path / "trl_ama"
    package.mkdir()
    (package / "__init__.py").write_text("")
    if module == "cli":
        (package / "registration.py").write_text((REPO / "trl_ama" / "registration.py").read_text())
    (package / f"{module}.py").write_text("raise RuntimeError('broken on purpose')\n")

    result = installed.run("-c", "print('started')", PYTHONPATH=str(tmp_path))
    assert (result.stdout, result.stderr) == ("started\n", "")
    commands = installed.trl_commands(PYTHONPATH=str(tmp_path))
    assert "dpo" in commands
    assert "ama" not in commands


@pytest.mark.parametrize("source", ["", "get_commands = None\n"])
def test_trl_of_another_shape_is_left_alone(installed, tmp_path, source):
    for folder in ("trl", "trl/cli", "trl/cli/commands"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text(source)
    code = "import trl.cli.commands as c; print(getattr(c, 'get_commands', None))"
    result = installed.run("-c", code, PYTHONPATH=str(tmp_path))
    assert (result.stdout, result.stderr) == ("None\n", "")


def test_command_that_trl_already_has_is_not_replaced(installed, tmp_path):
    for folder in ("trl", "trl/cli", "trl/cli/commands"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("")
    (tmp_path / "trl/cli/commands/base.py").write_text(
        "class Command:\n    def __init__(self, name, help_text):\n        self.name = name\nCommandContext = None\n"
    )
    (tmp_path / "trl/cli/commands/__init__.py").write_text(
        "from .base import Command\ndef get_commands():\n    return [Command('ama', 'theirs')]\n"
    )
    code = "from trl.cli.commands import get_commands as g; print([(type(c).__name__, c.name) for c in g()])"
    result = installed.run("-c", code, PYTHONPATH=str(tmp_path))
    expected = [("Command", "ama"), *(("AMACommand", name) for name in COMMANDS[1:])]
    assert result.stdout.strip() == str(expected), result.stderr


@pytest.mark.parametrize("editable", [False, True])
def test_uninstall_takes_the_hook_away(wheel, tmp_path, editable):
    environment = Environment(tmp_path / "env")
    environment.install(*(["-e", str(REPO)] if editable else [str(wheel)]))
    assert set(COMMANDS) <= set(environment.trl_commands())

    environment.pip("uninstall", "-q", "-y", "trl-ama")
    assert not list(environment.site_packages.glob("*trl_ama*"))
    assert not set(COMMANDS) & set(environment.trl_commands())
