"""SIGTERM and Ctrl-C save and leave with a code that says "run me again", and the run ends as if nothing had been."""

import os
import signal
import threading
import time
import traceback
from pathlib import Path

import pytest
import torch
from hub_world import parse
from places import ROOT
from ready import Job, run_module
from resumed_runs import At, assert_same, recipe_fixture, training_fixture  # noqa: F401 - fixtures
from surroundings import client_env
from trl import DPOTrainer

from trl_ama import run_pipeline
from trl_ama.common import interruption
from trl_ama.common.interruption import Interrupted, asked, caught, finishing
from trl_ama.dpo import sweep
from trl_ama.training import exact_resume


@pytest.fixture(autouse=True)
def handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert not interruption._state.before and interruption._state.sections == 0


# ---- Signals alone ----


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_between_sections_it_leaves_at_once(number, capfd):
    with pytest.raises(Interrupted) as left, caught():
        signal.raise_signal(number)
        pytest.fail("went on")
    assert left.value.code == 75 and isinstance(left.value, SystemExit)
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    expected = f"Interrupted by {name}: what was finished before is kept. Run the same command again to go on."
    assert str(left.value) == expected and capfd.readouterr().err == expected + "\n"


def test_within_a_section_it_only_asks(capfd):
    with pytest.raises(Interrupted), caught(), finishing():
        assert not asked()
        with finishing():
            signal.raise_signal(signal.SIGTERM)
            assert asked()
            signal.raise_signal(signal.SIGTERM)
        assert asked()  # and leaves at the end of the outer one
    assert "saving after this step" in capfd.readouterr().err


def test_a_second_ctrl_c_stops_at_once(monkeypatch):
    monkeypatch.setattr(interruption, "_ONE_PRESS", 0.0)
    with pytest.raises(KeyboardInterrupt), caught(), finishing():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert asked()
        signal.raise_signal(signal.SIGINT)
        pytest.fail("went on")


def test_a_launcher_that_passes_ctrl_c_on_does_not_make_it_two():
    with pytest.raises(Interrupted), caught(), finishing():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_handlers_of_others_stay():
    mine = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with caught():
            signal.raise_signal(signal.SIGTERM)
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        with caught(enabled=False):
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, mine)


def test_switched_off_inside_of_a_program_that_handles_them():
    with caught():
        with caught(enabled=False):
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_other_threads_are_left_alone():
    seen = []

    def work():
        with caught():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]


def test_forked_helpers_end_as_without_us():
    with caught():
        reads, writes = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(writes, b"1")
            time.sleep(30)
            os._exit(0)
        os.read(reads, 1)  # Python forgets in the child what comes before it has looked after itself
        os.kill(pid, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        time.sleep(0.05)
        return index


def test_data_loaders_outlive_a_signal_to_the_whole_group():
    with pytest.raises(Interrupted), caught(), finishing():
        found = []
        outliving = interruption.OutlivingWorker(None)
        for batch in torch.utils.data.DataLoader(Numbers(), num_workers=1, worker_init_fn=outliving):
            if not found:
                for number in (signal.SIGTERM, signal.SIGINT):
                    for child in interruption_children():
                        os.kill(child, number)
                    os.kill(os.getpid(), number)
            found += batch.tolist()
        assert found == list(range(6))


def interruption_children() -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process().children()]


# ---- Training ----


@pytest.mark.parametrize(
    ("step", "number", "settings"),
    [
        (4, signal.SIGINT, {"eval_strategy": "epoch", "logging_strategy": "epoch"}),  # the last one of an epoch
        (6, signal.SIGTERM, {}),  # and of the run
        (5, signal.SIGTERM, {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True,
                             "metric_for_best_model": "eval_worst_excess", "greater_is_better": True}),  # no best one
        (3, signal.SIGTERM, {"dataloader_num_workers": 2, "enable_jit_checkpoint": True}),
    ],
    ids=["epoch", "run", "best", "workers"],
)  # fmt: skip
def test_a_training_saves_and_goes_on_as_if_nothing_had_been(training, tmp_path, capfd, step, number, settings):
    whole = training("whole", **settings)
    whole.train()
    stopped = training("run", **settings)
    stopped.add_callback(At(step, number))
    with pytest.raises(Interrupted) as left:
        stopped.train()
    # With the workers of its data loader, for each of which garbage collection would wait 5 s
    traceback.clear_frames(left.tb)
    checkpoint = tmp_path / "run" / f"checkpoint-{step + 1}"
    assert (
        f"saved at step {step + 1} in '{checkpoint}'. Go on with `trainer.train(resume_from_checkpoint=True)`."
        in str(left.value)
    )
    assert str(left.value) in capfd.readouterr().err
    assert not (tmp_path / "run" / f"checkpoint-{step + 2}").exists()
    resumed = training("run", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_same(resumed, whole)


def test_a_signal_in_the_middle_of_a_save_does_not_break_it(training, tmp_path, monkeypatch):
    complete = exact_resume.complete_checkpoint

    def interrupted(folder, lacks=None):
        signal.raise_signal(signal.SIGTERM)
        complete(folder, lacks)

    monkeypatch.setattr(exact_resume, "complete_checkpoint", interrupted)
    trainer = training("run", save_steps=3)
    with pytest.raises(Interrupted, match="saved at step 4"):  # the next one
        trainer.train()
    found = exact_resume.newest_good_checkpoint(tmp_path / "run")
    assert found.step == 4 and not found.bad and (tmp_path / "run" / "checkpoint-3").exists()


def test_nothing_is_saved_where_nothing_should_be(training, tmp_path):
    trainer = training("run", save_strategy="no")
    trainer.add_callback(At(2))
    with pytest.raises(Interrupted, match="step 3 is not saved, as save_strategy is 'no'"):
        trainer.train()
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_switched_off_it_is_as_in_trl(training):
    trainer = training("run", save_on_signal=False)
    trainer.add_callback(At(2, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


# ---- The pipeline ----


def test_a_stage_is_named_and_the_next_run_goes_on(recipe, tmp_path, monkeypatch):
    def run(name, *stages):
        flags = ["--output_dir", tmp_path / name, "--per_device_eval_batch_size", "2"]
        run_pipeline(*parse(recipe, *flags), stages=stages or ("specialists", "losses"))

    step, forward, calls = DPOTrainer.training_step, sweep.packed_forward, []

    def third_step(self, *args, **kwargs):
        if self.state.global_step == 2:
            signal.raise_signal(signal.SIGTERM)
        return step(self, *args, **kwargs)

    def third_batch(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return forward(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(DPOTrainer, "training_step", third_step)
        with pytest.raises(Interrupted) as left:
            run("run")
    assert str(left.value) == (
        "Interrupted by SIGTERM: saved at step 3 of the specialist of task 'list'. Run the same command again to go on."
    )
    run("run", "specialists")
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "packed_forward", third_batch)
        with pytest.raises(Interrupted, match=r"saved \d+ of 34 scored pairs \(Reference losses, list\)"):
            run("run")
    assert list((tmp_path / "run" / "reference_losses" / ".list.shards").glob("*.parquet"))
    run("run")
    run("whole")
    for pattern in ("specialists/*/adapter_model.safetensors", "reference_losses/*/*.parquet"):
        paths = sorted((tmp_path / "whole").glob(pattern))
        assert len(paths) > 1
        for path in paths:
            assert path.read_bytes() == (tmp_path / "run" / path.relative_to(tmp_path / "whole")).read_bytes(), path


def wait_for(path: Path, pattern: str, process: Job) -> None:
    end = time.monotonic() + 120
    while not list(path.glob(pattern)):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)


def test_the_command_passes_the_signal_on_and_returns_the_code(recipe, tmp_path):
    """The whole way: `trl-ama`, accelerate, the script; with a signal to the first of these processes alone."""
    command = ["ama", "--config", recipe, "--output_dir", tmp_path / "run"]
    environ = {**client_env(tmp_path / "home"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    flags = ["--specialist_args", "{max_steps: 100000}", "--save_steps", "5"]
    arguments = list(map(str, [*command, *flags]))
    process = Job(run_module, "trl_ama", arguments, folder=tmp_path / "printed", environ=environ, seconds=180)
    try:
        wait_for(tmp_path / "run", "specialists/list/checkpoint-5/ama_files.json", process)
        process.send_signal(signal.SIGTERM)
        code, errors = process.wait(), process.stderr
    finally:
        process.send_signal(signal.SIGKILL)
    assert code == 75, errors
    last = errors.strip().splitlines()[-1]
    assert last.startswith("Interrupted by SIGTERM: saved at step ") and last.endswith(
        "Run the same command again to go on."
    )
    assert "Traceback" not in errors
