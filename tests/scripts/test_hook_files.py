"""The three files of the start-up hook by themselves: in which processes they act, what they may not do, what the page says."""

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint

import pytest
from bare_environment import HOOK, Environment
from places import ROOT

from trl_ama import cli


BY_VERSION = sys.version_info >= (3, 15)  # PEP 829: Python imports the module itself, in every process
STATE = "import sys; print('trl_ama_register' in sys.modules, sum(type(f).__name__ == 'TRLAMAFinder' for f in sys.meta_path))"
PAGE = (ROOT / "docs" / "startup.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Environment:
    """Has the hook and programs of many names, which say whether it was imported and how many finders wait."""
    environment = Environment(tmp_path_factory.mktemp("bare") / "env", borrow=False)
    for name in HOOK:
        shutil.copy(ROOT / name, environment.site_packages)
    programs = [f"bin/{name}" for name in ("trl", "trl-ama", "trlx", "mytrl", "trl.py", "pip")]
    programs += [f"Scripts/{name}" for name in ("trl.exe", "TRL.EXE", "trl-script.py")]
    modules = ["trl/__main__.py", "trl/cli/__main__.py", "trl/cli/main.py", "trl/cli/other.py"]
    empty = ["trl/__init__.py", "trl/cli/__init__.py", "trl/cli/commands.py"]
    for name in [*programs, *modules, *empty]:
        path = environment.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("" if name in empty else f"#!{environment.python}\n{STATE}\n")
        path.chmod(0o755)
    (environment.path / "link").mkdir()
    for link in ("trl", "train"):
        (environment.path / "link" / link).symlink_to(environment.path / "bin/trl")
    return environment


def state(result: subprocess.CompletedProcess) -> tuple[bool, int]:
    assert (result.returncode, result.stderr) == (0, "")
    imported, finders = result.stdout.split()
    return imported == "True", int(finders)


# ---- Which processes ----

STARTS_OF_TRL = [
    "bin/trl ama --config recipe.yaml",
    "link/trl ama",
    "python bin/trl ama",
    "python -u -X dev -W ignore bin/trl",
    "python -I bin/trl ama",
    "python -- bin/trl",
    "python Scripts/trl.exe ama",
    "python Scripts/TRL.EXE ama",
    "python Scripts/trl-script.py ama",
    "python -m trl ama",
    "python -m trl.cli ama",
    "python -Bm trl.cli.main ama trl",
]
OTHER_STARTS = [
    "python -c STATE trl",
    "python -c STATE bin/trl ama",
    "bin/trl-ama --config recipe.yaml",
    "bin/trlx",
    "bin/mytrl",
    "bin/pip install trl",
    "bin/trl.py",
    "link/train ama",  # what counts is the name
    "python bin/pip show trl",
    "python -m trl.cli.other trl",
]


def start(bare: Environment, line: str, **environ: str) -> subprocess.CompletedProcess:
    first, *rest = [STATE if word == "STATE" else word for word in line.split()]
    return bare.execute(bare.python if first == "python" else bare.path / first, *rest, **environ)


@pytest.mark.parametrize("line", STARTS_OF_TRL)
def test_acts_in_a_process_of_trl(bare, line):
    assert state(start(bare, line)) == (True, 1)


@pytest.mark.parametrize("line", OTHER_STARTS)
def test_does_not_act_elsewhere(bare, line):
    assert state(start(bare, line)) == (BY_VERSION, 0)


@pytest.mark.parametrize("line", ["bin/trl ama", "python -m trl.cli.main ama"])
def test_without_site_there_is_no_hook(bare, line):
    line = line.replace("bin/", "python bin/").replace("python ", "python -S ")
    assert state(start(bare, line)) == (False, 0)


@pytest.mark.parametrize("value, finders", [("1", 0), ("true", 0), ("0", 1), ("", 1)])
def test_the_switch_turns_it_off(bare, value, finders):
    assert state(start(bare, "bin/trl ama", TRL_AMA_NO_HOOK=value)) == (True, finders)
    assert state(start(bare, "bin/trlx", TRL_AMA_NO_HOOK=value)) == (BY_VERSION, 0)


def test_a_process_that_is_not_trl_loads_nothing_of_ours(bare):
    listed = bare.run("-X", "importtime", "-c", "pass").stderr
    assert "site" in listed
    assert re.findall(r"\btrl\w*", listed) == ["trl_ama_register"] * BY_VERSION


# ---- No failure stops a process ----


@pytest.mark.parametrize("source", [None, "raise RuntimeError('on purpose')\n", "def register(): 1 / 0\n", "x = (\n"])
def test_what_is_broken_stops_no_process(bare, tmp_path, source):
    environment = Environment(tmp_path / "env", borrow=False)
    for name in HOOK:
        shutil.copy(ROOT / name, environment.site_packages)
    module = environment.site_packages / "trl_ama_register.py"
    if source is None:
        module.unlink()
    else:
        module.write_text(source)
    environment.trl.write_text("print('started')\n")
    result = environment.run("-c", "print('started')")
    assert (result.returncode, result.stdout) == (0, "started\n")
    assert BY_VERSION or result.stderr == ""
    result = environment.run(environment.trl)
    assert (result.returncode, result.stdout) == (0, "started\n")
    assert "trl_ama_register" in result.stderr  # Python says what it did not run


@pytest.mark.parametrize("orig_argv", [[], ["python"], ["python", "-m"]])
@pytest.mark.parametrize("argv", [[], [""], ["trl"], ["a", "b", "c", "d"]])
def test_embedded_pythons_have_odd_arguments(bare, orig_argv, argv):
    code = f"import site, sys; sys.orig_argv, sys.argv = {orig_argv}, {argv}; "
    code += f"site.addsitedir({str(bare.site_packages)!r}); {STATE}"
    assert state(bare.run("-c", code)) == (BY_VERSION, 0)


# ---- Both at once, and again ----


def test_both_ways_and_twice_is_once(bare):
    code = f"""
import pkgutil, site, sys
sys.orig_argv, sys.argv = ["python", "/bin/trl"], ["/bin/trl"]
for _ in range(2):
    site.addsitedir({str(bare.site_packages)!r})
    pkgutil.resolve_name({entry_point().value!r})()
{STATE}
sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "TRLAMAFinder"]
import trl.cli.commands  # loaded: too late, and a finder would wait for ever
pkgutil.resolve_name({entry_point().value!r})()
{STATE}
"""
    lines = bare.run("-c", code).stdout.splitlines()
    assert lines == ["True 1", "True 0"]


# ---- What the files say ----


def entry_point() -> EntryPoint:
    lines = (ROOT / "trl_ama_register.start").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if line and not line.startswith("#")]
    return EntryPoint("start", line, "start")


def test_start_file_names_a_function_that_can_be_called():
    point = entry_point()
    assert re.fullmatch(r"\w+(\.\w+)*:\w+", point.value)  # PEP 829 wants both parts, and no extras
    before = list(sys.meta_path)
    assert point.load()() is None
    assert sys.meta_path == before  # pytest is not `trl`


def pth_line() -> str:
    lines = (ROOT / "trl_ama_register.pth").read_text(encoding="ascii").splitlines()
    (line,) = [line for line in lines if not line.startswith("#")]
    return line


def calls(tree: ast.AST) -> set[str]:
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def test_line_is_plain_and_imports_only_what_python_has_loaded():
    tree = ast.parse(pth_line())
    assert len(pth_line()) < 250
    assert not re.search(r"exec|eval|compile|base64|find_spec|subprocess|socket|open|lambda|\\", pth_line())
    *rest, last = tree.body
    assert [type(statement) for statement in rest] == [ast.Import, ast.Assign]
    assert {name.name for name in rest[0].names} == {"os", "sys"}
    # Nothing is called that is not read, but for the one module
    assert calls(last) == {"__import__", "__import__('trl_ama_register').register"}
    assert isinstance(last.value, ast.BoolOp) and isinstance(last.value.op, ast.And)


def test_line_and_module_ask_the_same():
    import trl_ama_register

    (names,) = [ast.literal_eval(node) for node in ast.walk(ast.parse(pth_line())) if isinstance(node, ast.Tuple)]
    assert names == trl_ama_register.PROGRAMS


def test_module_is_small_and_starts_nothing():
    source = (ROOT / "trl_ama_register.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    imports = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    imports |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imports == {"os", "sys", "trl_ama.registration"}
    assert not calls(tree) & {"exec", "eval", "compile", "open", "__import__"}
    assert len(source.splitlines()) < 70


def test_project_declares_the_commands_and_ships_the_files():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (value,) = project["project"]["entry-points"]["trl.commands"].values()
    commands = EntryPoint("commands", value, "trl.commands").load()()
    assert [command.name for command in commands] == list(cli.COMMANDS)
    shipped = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert shipped == {name: name for name in HOOK}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert set(re.search(r"^HOOK := (.*)$", makefile, re.MULTILINE)[1].split()) == set(HOOK)


# ---- What the page says ----


def test_page_shows_the_files_as_they_are():
    blocks = re.findall(r"^```\w*\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    for name in HOOK:
        assert (ROOT / name).read_text(encoding="utf-8") in blocks, f"docs/startup.md does not show {name} as it is"


def test_page_has_the_hashes_of_the_files():
    shown = {name: digest for digest, name in re.findall(r"^([0-9a-f]{64})  (\S+)$", PAGE, re.MULTILINE)}
    assert shown == {name: hashlib.sha256((ROOT / name).read_bytes()).hexdigest() for name in HOOK}


def test_page_names_every_program_and_the_switch():
    import trl_ama_register

    for name in (*trl_ama_register.PROGRAMS, "TRL_AMA_NO_HOOK=1"):
        assert f"`{name}`" in PAGE or f"`python -m {name}`" in PAGE, name


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_command_on_the_page_prints_what_the_page_says(bare):
    (commands,) = re.findall(r"^```bash\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    (printed,) = re.findall(r"^```text\n((?:[0-9a-f]{64}  \S+\n)+)```", PAGE, re.MULTILINE)
    path = os.pathsep.join([str(bare.path / "bin"), os.environ["PATH"]])
    assert bare.execute("bash", "-c", commands, PATH=path).stdout == printed
