"""The short form of the chaos suite, see tests/support/chaos.py: two kills in every stage, and a look at whether it would notice."""

import json
import os

import pytest
from chaos import differences, draws_of, main, what_it_is
from ready import Job, leave_with


pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="every process of the suite is a fork")


@pytest.mark.slow
def test_two_kills_in_every_stage_change_nothing(tmp_path):
    flags = ["--kills", "2", "--variants", "plain", "--output", str(tmp_path)]
    flags += ["--tasks", "2", "--steps", "10", "--specialist_steps", "7"]  # each of them across epochs
    job = Job(leave_with, main, flags, folder=tmp_path, seconds=400)
    assert job.wait() == 0, job.stdout + job.stderr
    report = json.loads((tmp_path / "chaos.json").read_text())
    assert [(row["stage"], row["equal"]) for row in report["stages"]] == [
        ("specialists", True), ("losses", True), ("train", True),
    ]  # fmt: skip
    assert all(row["kills"] >= 2 and row["ends"] >= 1 for row in report["stages"])


def test_a_difference_of_one_digit_or_draw_is_found(tmp_path):
    folder = tmp_path / "run" / "generalists" / "ama_s"
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    log = [{"step": 1, "ama/weight/list": 0.25, "train_runtime": 3.0}]
    state = {
        "stateful_callbacks": {"ama": {"strategy": {"q": 1}}},
        "global_step": 1,
        "epoch": 1.0,
        "best_global_step": None,
    }
    state |= {"best_metric": None, "total_flos": 2.0, "log_history": log}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    (tmp_path / "draws-0.log").write_text("ama_s 0 0 11\nama_s 1 0 12\nama_s 1 0 12\n")
    expected, drawn = what_it_is(tmp_path / "run"), draws_of(tmp_path)
    assert differences(tmp_path / "run", expected, drawn) == []
    log[0] |= {"train_runtime": 4.0}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    assert differences(tmp_path / "run", expected, drawn) == []
    log[0] |= {"ama/weight/list": 0.25000000000000006}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    (folder / "adapter_model.safetensors").write_bytes(b"weightt")
    (tmp_path / "draws-0.log").write_text("ama_s 0 0 11\nama_s 1 0 12\nama_s 1 0 13\n")
    assert differences(tmp_path / "run", expected, drawn) == [
        "adapter ama_s", "log of ama_s", "draws of draws-0 ama_s 1 0",
    ]  # fmt: skip
