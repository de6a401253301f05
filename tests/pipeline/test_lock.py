"""Two runs in one output folder: the second is told at once by whom it is held, and a dead process holds nothing."""

import contextlib
import json
import logging
import os
import signal
import socket
import time
from contextlib import contextmanager

import filelock
import psutil
import pytest
from accelerate import PartialState
from hub_world import parse
from resumed_runs import recipe_fixture  # noqa: F401 - fixtures

import trl_ama
from trl_ama import AMAError, run_pipeline
from trl_ama.pipeline import lock as run_lock
from trl_ama.pipeline.lock import folder_held


@pytest.fixture(autouse=True)
def accelerate_state():
    PartialState()  # its logger asks it who is the main process


@contextmanager
def another_process(folder, tasks=None):
    """A process that holds a folder until it is killed. Yields its number."""
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with folder_held(folder, tasks):
                os.write(writes, b"1")
                time.sleep(60)
        finally:
            os._exit(1)
    try:
        assert os.read(reads, 1) == b"1"
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reads)
        os.close(writes)


def refused(folder, tasks=None) -> str:
    begun = time.monotonic()
    with pytest.raises(AMAError) as caught, folder_held(folder, tasks):
        pass
    assert time.monotonic() - begun < 1
    return str(caught.value)


def test_the_second_is_told_at_once_by_whom(tmp_path):
    with another_process(tmp_path) as pid:
        text = refused(tmp_path)
    assert f"The folder '{tmp_path}' is in use by process {pid} on {socket.gethostname()} since 20" in text
    assert text.endswith("Wait until it is done, or choose another output_dir.") and "\n" not in text


def test_a_dead_process_holds_nothing(tmp_path, caplog):
    with another_process(tmp_path) as pid:
        pass
    assert json.loads((tmp_path / ".locks" / "run.json").read_text())["pid"] == pid
    with caplog.at_level(logging.INFO, logger="trl_ama.pipeline.lock"), folder_held(tmp_path):
        assert f"was left by process {pid} on {socket.gethostname()}" in caplog.text and "which is gone" in caplog.text
        assert json.loads((tmp_path / ".locks" / "run.json").read_text())["pid"] == os.getpid()
    assert not (tmp_path / ".locks" / "run.json").exists()
    with folder_held(tmp_path):
        pass


def test_jobs_of_other_tasks_share_a_folder(tmp_path):
    with another_process(tmp_path, ["a", "b"]) as pid, another_process(tmp_path, ["c"]):
        with folder_held(tmp_path, ["d"]):
            pass
        assert f"Task 'b' in '{tmp_path}' is in use by process {pid}" in refused(tmp_path, ["b", "d"])
        with folder_held(tmp_path, ["d"]):  # nothing is left held by what was refused
            pass
        assert f"Task 'a' in '{tmp_path}' is in use by process {pid}" in refused(tmp_path)


def test_a_whole_run_keeps_jobs_out(tmp_path):
    with another_process(tmp_path) as pid:
        assert f"The folder '{tmp_path}' is in use by process {pid}" in refused(tmp_path, ["a"])


def test_one_that_only_looks_keeps_nobody_out(tmp_path, monkeypatch):
    """For a moment, a job holds the lock of whole runs to see whether it is held."""
    monkeypatch.setattr(run_lock, "_PATIENCE", 20.0)
    looking = run_lock._Lock(tmp_path, "run")
    with looking.held(noted=False):
        pid = os.fork()
        if pid == 0:
            try:
                with folder_held(tmp_path):
                    os._exit(0)
            finally:
                os._exit(1)
        time.sleep(0.2)
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    assert os.waitpid(pid, 0)[1] == 0


class NoFlock(filelock.FileLock):
    def _acquire(self):
        raise NotImplementedError("FileSystem does not appear to support flock; use SoftFileLock instead")


def test_where_there_are_no_locks_a_file_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "FileLock", NoFlock)
    with another_process(tmp_path) as pid:
        assert f"in use by process {pid}" in refused(tmp_path)
    assert (tmp_path / ".locks" / "run.lock").exists()  # killed, so it could not remove it
    with folder_held(tmp_path):
        pass


def test_a_process_of_another_machine_is_not_known_to_be_dead(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "_PATIENCE", 0.1)
    with another_process(tmp_path):
        note = tmp_path / ".locks" / "run.json"
        note.write_text(json.dumps({**json.loads(note.read_text()), "host": "node7", "pid": 1}))
        text = refused(tmp_path)
    assert (
        "process 1 on node7" in text and f"If nothing runs on node7 any more, delete '{tmp_path / '.locks'}'." in text
    )


def test_numbers_of_processes_come_again(tmp_path):
    holder = {"pid": os.getpid(), "born": psutil.Process().create_time()}
    assert run_lock._is_alive(holder)
    assert not run_lock._is_alive({**holder, "born": holder["born"] - 3600})
    assert not run_lock._is_alive({**holder, "pid": 2**22 + 1})


def test_no_secret_is_written(tmp_path, monkeypatch):
    script = os.path.join(os.path.dirname(trl_ama.__file__), "scripts", "ama.py")
    monkeypatch.setattr("sys.argv", [script, "--config", "/home/me/x.yaml", "--hub_token", "hf_secret"])
    with folder_held(tmp_path):
        text = (tmp_path / ".locks" / "run.json").read_text()
    assert "trl ama --config" in text and "secret" not in text and "/home/me" not in text


def test_the_pipeline_holds_its_folder(recipe, tmp_path, monkeypatch):
    seen = []

    def stop(settings, *args):
        seen.append(sorted(path.name for path in (settings.folder.path / ".locks").glob("*.json")))
        raise AMAError("enough")

    monkeypatch.setattr("trl_ama.pipeline.run.check_recipe", stop)
    for stages in (("specialists", "losses", "train", "eval"), ("specialists",), ("losses",)):
        with pytest.raises(AMAError, match="enough"):
            run_pipeline(*parse(recipe, "--output_dir", tmp_path), stages=stages)
    assert seen == [["run.json"], ["task-list.json", "task-sort.json"], ["task-list.json", "task-sort.json"]]


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(AMAError, match=r"The output folder '.*file/run' cannot be written to"),
        folder_held(tmp_path / "file" / "run"),
    ):
        pass


@pytest.mark.parametrize("tasks", [None, ["a", "b"]])
def test_nothing_is_left_of_a_run_that_wrote_nothing(tmp_path, tasks):
    with pytest.raises(AMAError, match="refused"), folder_held(tmp_path / "some" / "where", tasks):
        assert (tmp_path / "some" / "where" / ".locks").is_dir()
        raise AMAError("refused")
    assert not list(tmp_path.iterdir())
    with folder_held(tmp_path / "some", tasks):
        (tmp_path / "some" / "result").write_text("done")
    assert (tmp_path / "some" / "result").is_file()


def test_another_job_s_lock_stays(tmp_path):
    with contextlib.ExitStack() as other:
        with folder_held(tmp_path / "run", ["a"]):
            pid = other.enter_context(another_process(tmp_path / "run", ["b"]))
        assert f"Task 'b' in '{tmp_path / 'run'}' is in use by process {pid}" in refused(tmp_path / "run", ["b"])
