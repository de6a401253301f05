"""The commands: what reaches the script, what reaches `accelerate launch`, and how errors read."""

import importlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import pytest
from places import ROOT
from ready import Job, run_module

from trl_ama import cli
from trl_ama.common import interruption
from trl_ama.common.errors import AMAError
from trl_ama.scripts import ama, common


SCRIPTS = {name: importlib.import_module(f"trl_ama.scripts.{name.replace('-', '_')}") for name in cli.COMMANDS}


pytestmark = pytest.mark.usefixtures("restored_environment")


@pytest.fixture
def config(tmp_path):
    """Write a config file and return the flags that name it; a machine without a GPU needs `use_cpu`."""

    def write(text: str = "") -> list[str]:
        path = tmp_path / "config.yaml"
        path.write_text(f"output_dir: {tmp_path / 'out'}\nuse_cpu: true\n{text}", encoding="utf-8")
        return ["--config", str(path)]

    return write


def split(argv: list[str]) -> tuple[list[str], list[str]]:
    return common.split_arguments(ama.make_parser(prog="trl ama"), argv)


def error_of(argv: list[str]) -> str:
    with pytest.raises(AMAError) as raised:
        split(argv)
    return str(raised.value)


def test_script_gets_its_flags_and_accelerate_gets_the_others(config):
    argv = [*config(), "--num_processes", "2", "--seed", "2", "--main_process_port=29501", "--learning_rate", "1e-6"]
    launch_args, script_args = split(argv)
    assert launch_args == ["--num_processes", "2", "--main_process_port=29501"]
    assert script_args == [*argv[:2], "--seed", "2", "--learning_rate", "1e-6"]


def test_accelerate_gets_its_keys_of_the_config_file(config):
    keys = "num_processes: 2\nmulti_gpu: true\ndynamo_use_dynamic: false\nnum_machines: null\nseed: 3\n"
    launch_args, script_args = split([*config(keys), "--num_processes", "4"])
    # A switch has no value, a null is not passed on, and the command line comes last because the last one counts.
    assert launch_args == ["--num_processes", "2", "--multi_gpu", "--num_processes", "4"]
    assert script_args == config(keys)


def test_accelerate_config_is_resolved_and_the_command_line_wins(config):
    argv = config("accelerate_config: zero3\n")
    (flag, path), _ = split(argv)
    assert flag == "--config_file"
    assert path.endswith("zero3.yaml")
    for overriding in (["--accelerate_config", "single_gpu"], ["--accelerate_config=single_gpu"]):
        (_, path), _ = split([*argv, *overriding])
        assert path.endswith("single_gpu.yaml")
    assert "nonsense" in error_of([*argv, "--accelerate_config", "nonsense"])


def test_env_is_set(config):
    split(config("env:\n  TRL_AMA_TEST: 7\n"))
    assert os.environ["TRL_AMA_TEST"] == "7"


def test_config_may_be_joined_by_an_equals_sign(config):
    flag, path = config("seed: 5\n")
    assert split([f"{flag}={path}"]) == ([], [flag, path])
    _, training_args, *_ = common.parse_arguments(ama.make_parser(), [f"{flag}={path}"])
    assert training_args.seed == 5


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [("learning_rat", "learning_rate"), ("num_proceses", "num_processes"), ("smothing", "smoothing")],
)
def test_unknown_key_is_named_with_file_line_and_the_nearest_key(config, key, suggestion):
    argv = config(f"seed: 1\n{key}: 3\n")
    message = error_of(argv)
    assert f"{argv[1]}, line 4, has the key '{key}'" in message
    assert message.endswith(f"Did you mean '{suggestion}'?")
    with pytest.raises(AMAError, match=re.escape(message)):  # the same when the script is launched by hand
        common.parse_arguments(ama.make_parser(), argv)


@pytest.mark.parametrize(
    ("flag", "suggestion"),
    [("--learning_rats", "--learning_rate"), ("--num_proceses", "--num_processes"), ("--smothing=1", "--smoothing")],
)
def test_unknown_flag_is_named_with_the_nearest_flag(config, flag, suggestion):
    message = error_of([*config(), flag, "2"])
    assert f"'{flag.partition('=')[0]}'" in message
    assert message.endswith(f"Did you mean '{suggestion}'?")


def test_word_that_no_flag_takes_is_not_run_as_the_script(config):
    assert "'stray'" in error_of([*config(), "stray"])
    assert "'stray'" in error_of([*config(), "--num_processes", "2", "stray"])


def test_error_of_a_dataclass_is_one_sentence(config):
    assert "smoothing" in error_of([*config(), "--smoothing", "7"])
    message = error_of([*config(), "--warmup_steps", "-1"])  # a plain ValueError, of transformers
    assert "warmup_steps" in message
    assert "\n" not in message


@pytest.mark.parametrize("suffix", [["--num_processes", "2"], ["--num_proces", "2"]])
def test_script_launched_by_hand_refuses_flags_that_are_not_its_own(config, suffix):
    with pytest.raises(AMAError, match="accelerate launch"):
        common.parse_arguments(ama.make_parser(), [*config(), *suffix])


def test_script_launched_by_hand_accepts_accelerates_keys(config):
    argv = config("num_processes: 2\naccelerate_config: zero3\nseed: 4\n")
    _, training_args, *_ = common.parse_arguments(ama.make_parser(), argv)
    assert training_args.seed == 4


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "cannot be read"),
        ("a: [1\nb: 2\n", "line 2, is not valid YAML"),
        ("- a\n- b\n", "line 1, must hold a YAML mapping"),
        ("", "holds nothing"),
        ("seed: 1\nenv: [A]\n", "line 2: `env` must be a mapping"),
        (b"a: \xff\xfe", "is not valid YAML"),
    ],
)
@pytest.mark.parametrize("command", ["ama", "ama-eval"])
def test_unusable_config_file_is_one_line_and_exit_code_2(tmp_path, capsys, command, content, expected):
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit) as raised:
        cli.main([command, "--config", str(path)])
    assert raised.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"trl {command}: error: The config file {path}")
    assert expected in line


def test_config_without_a_path(capsys):
    with pytest.raises(SystemExit):
        cli.main(["ama", "--config"])
    assert "--config needs the path" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [name for name, script in SCRIPTS.items() if not {"run_here", "run_without_recipe"} & set(vars(script))],
)
def test_every_command_launches_its_script(config, monkeypatch, command):
    launched = []
    monkeypatch.setattr("trl.cli.accelerate_launcher.launch_training_script", lambda *args: launched.append(args))
    argv = [*config(), "--num_processes", "2"]
    assert cli.main([command, *argv]) == 0
    assert launched == [(SCRIPTS[command].__file__, argv[2:], argv[:2])]


def test_flags_without_a_command_are_for_ama(config, monkeypatch):
    launched = []
    monkeypatch.setattr("trl.cli.accelerate_launcher.launch_training_script", lambda *args: launched.append(args))
    assert cli.main(config()) == 0
    assert launched == [(ama.__file__, [], config())]


def test_help_lists_the_commands(capsys):
    assert cli.main([]) == 0
    listed = capsys.readouterr().out
    assert all(command in listed for command in cli.COMMANDS)
    with pytest.raises(SystemExit) as raised:
        cli.main(["ama", "-h"])
    assert raised.value.code == 0
    assert "--smoothing" in capsys.readouterr().out


def elastic_failure(*codes: int) -> Exception:
    """The error of torch's elastic agent, whose processes ended in this order with these codes."""
    error = RuntimeError("ChildFailedError")
    error.failures = {i: types.SimpleNamespace(timestamp=i, exitcode=code) for i, code in enumerate(codes)}
    return error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (subprocess.CalledProcessError(7, ["python"]), 7),
        (subprocess.CalledProcessError(-15, ["python"]), 143),
        (elastic_failure(3, -15), 3),
    ],
)
def test_exit_code_is_that_of_the_script(config, monkeypatch, error, code):
    def fail(*args):
        raise error

    monkeypatch.setattr("trl.cli.accelerate_launcher.launch_training_script", fail)
    assert cli.main(["ama", *config()]) == code


def test_flags_that_accelerate_refuses(config, capsys):
    with pytest.raises(SystemExit) as raised:
        cli.main(["ama", *config(), "--multi_gpu", "--cpu"])
    assert raised.value.code == 2
    assert "trl ama: error: accelerate launch refused" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "stages"),
    [
        ("ama", ("specialists", "losses", "train", "eval")),
        ("ama-specialists", ("specialists",)),
        ("ama-losses", ("losses",)),
        ("ama-eval", ("eval",)),
    ],
)
def test_every_script_runs_its_stages(config, monkeypatch, command, stages):
    calls = []
    pipeline = types.ModuleType("trl_ama.pipeline.run")
    pipeline.run_pipeline = lambda *args, stages: calls.append((args, stages))
    monkeypatch.setitem(sys.modules, "trl_ama.pipeline.run", pipeline)
    script = SCRIPTS[command]
    monkeypatch.setattr(sys, "argv", [script.__file__, *config("seed: 9\n")])
    common.run_script(command, script.make_parser, script.main)
    ((arguments, run),) = calls
    assert run == stages
    assert [type(argument).__name__ for argument in arguments] == [
        "PipelineArguments",
        "AMAConfig",
        "ModelConfig",
        "TaskMixtureConfig",
    ]
    assert arguments[1].seed == 9


def test_a_launched_script_reports_its_error_in_one_line(config, tmp_path):
    """End to end, through `python -m trl_ama` and accelerate, with a pipeline that only says what it was given."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, types\n"
        "def run_pipeline(pipeline_args, training_args, model_args, task_args, stages):\n"
        "    import os\n"
        "    from trl_ama.common.errors import AMAError\n"
        "    raise AMAError(f'seed {training_args.seed},\\n env {os.environ[\"TRL_AMA_TEST\"]}')\n"
        "sys.modules['trl_ama.pipeline.run'] = types.ModuleType('trl_ama.pipeline.run')\n"
        "sys.modules['trl_ama.pipeline.run'].run_pipeline = run_pipeline\n"
    )
    argv = [*config("env:\n  TRL_AMA_TEST: seven\nnum_processes: 1\n"), "--seed", "11"]
    environ = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    result = Job(run_module, "trl_ama", ["ama", *argv], folder=tmp_path / "printed", environ=environ)
    assert result.wait() == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1] == "trl ama: error: seed 11, env seven"
    assert result.stderr.count("error:") == 1


# ---- Signals ----

WORKER = """
import os, sys, time
from pathlib import Path
from trl_ama.common import interruption
from trl_ama.common.errors import AMAError
from trl_ama.scripts.common import report_errors

how, rank = sys.argv[1], os.environ["RANK"]
with interruption.caught(how != "switched off"), report_errors("ama"), interruption.finishing():
    Path(__file__).with_name(f"ready-{rank}").touch()
    while not interruption.asked():
        time.sleep(0.05)
    Path(__file__).with_name(f"asked-{rank}").touch()
    if how == "disk full" and rank == "0":
        raise AMAError("The disk is full.")
    if how == "hangs":
        time.sleep(100)
    interruption.leave("all is saved")
"""


@pytest.fixture
def launch(tmp_path):
    """Start the command with a script of two processes; `wait` for files of theirs."""
    (tmp_path / "worker.py").write_text(WORKER)
    started = []

    def start(how, **environ):
        code = "import sys; from pathlib import Path; from trl_ama import cli\n"
        code += f"sys.exit(cli._launch(Path({str(tmp_path / 'worker.py')!r}), sys.argv[1:-1], sys.argv[-1:]))"
        flags = ["--multi_gpu", "--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", code, *flags, how],
                env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), **environ},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    def wait(name):
        end = time.monotonic() + 120
        while len(list(tmp_path.glob(f"{name}-*"))) < 2:
            assert started[-1].poll() is None and time.monotonic() < end
            time.sleep(0.05)

    yield start, wait
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("how", "code"),
    [("saves", 75), ("disk full", 2), ("hangs", 143), ("switched off", 143)],
    ids=lambda value: str(value),
)
def test_several_processes_want_to_go_on_only_if_they_left_in_order(launch, tmp_path, how, code):
    start, wait = launch
    process = start(how, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="2" if how == "hangs" else "60")
    wait("ready")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    assert ("all is saved" in errors) == (code == 75)
    assert not list(tmp_path.glob("trl_ama_*"))


def test_a_second_ctrl_c_stops_several_processes_at_once(launch):
    start, wait = launch
    process = start("hangs", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="100")
    wait("ready")
    process.send_signal(signal.SIGINT)
    wait("asked")
    time.sleep(2 * interruption._ONE_PRESS)
    before = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert time.monotonic() - before < 30
    assert "trl ama: stopped" in errors


@pytest.fixture
def launched(monkeypatch):
    """Run `_launch` with a function in place of TRL's launcher."""

    def run(launcher):
        monkeypatch.setattr("trl.cli.accelerate_launcher.launch_training_script", launcher)
        before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
        try:
            return cli._launch(Path("script.py"), [], [])
        finally:
            assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
            assert interruption.NOTE not in os.environ

    return run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_anything_is_launched_ends_the_command(launched, capfd, number):
    """Nor does a process that runs something else count."""

    def launcher(*args):
        with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE):
            signal.raise_signal(number)
        pytest.fail("went on")

    with pytest.raises(interruption.Interrupted) as left:
        launched(launcher)
    assert left.value.code == 75
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    assert (
        capfd.readouterr().err == f"Interrupted by {name}: nothing has begun. Run the same command again to go on.\n"
    )


def test_a_process_that_the_same_signal_has_ended_has_its_own_code(launched, monkeypatch):
    wait = os.waitpid

    def signal_after(*args):
        ended = wait(*args)
        if ended[0]:
            signal.raise_signal(signal.SIGTERM)
        return ended

    def launcher(*args):
        process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
        monkeypatch.setattr(os, "waitpid", signal_after)
        raise subprocess.CalledProcessError(process.wait(), "python")

    assert launched(launcher) == 3


def test_without_a_place_for_temporary_files(launched, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "mkdtemp", fail)
    assert launched(lambda *args: None) == 0


def test_on_windows_ctrl_c_is_not_passed_on(launched, monkeypatch):
    """The console has told the process already, and there is no such signal for it."""

    def launcher(script, *args):
        process = subprocess.Popen([sys.executable, "-c", "input()", script], stdin=subprocess.PIPE)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "platform", "win32")
            signal.raise_signal(signal.SIGINT)
        process.communicate(b"go on\n", timeout=60)
        assert process.returncode == 0

    assert launched(launcher) == 0
