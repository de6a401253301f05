"""What a kill leaves behind: half a checkpoint counts for nothing and is named, and nothing that was being written stays for ever."""

import itertools
import logging
import os
import shutil
import time
from pathlib import Path

import pytest
from places import PACKAGE
from resumed_runs import training_fixture  # noqa: F401 - fixtures
from transformers.trainer_utils import rotate_checkpoints

from trl_ama import AMAError, TaskMixtureConfig
from trl_ama.common.files import write_file, write_json
from trl_ama.merge.folder import NOTE_FILE, whole_or_not
from trl_ama.pipeline.lock import folder_held
from trl_ama.report.page import save_page
from trl_ama.tasks.loading import read_tasks
from trl_ama.training import checkpoints
from trl_ama.training.checkpoints import (
    begin_checkpoint,
    checkpoints_in,
    complete_checkpoint,
    half_of,
    newest_good_checkpoint,
    remove_checkpoint,
    remove_halves,
    rotate,
)


class Killed(BaseException):
    """SIGKILL, as far as Python can play it: nothing that is not a file survives, and no handler runs."""


def make_checkpoint(folder: Path, step: int, listed: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    if listed:
        begin_checkpoint(path)
    (path / "weights.safetensors").write_bytes(bytes(step))
    (path / "optimizer.pt").write_bytes(b"state")
    write_json(path / "trainer_state.json", {"global_step": step})
    if listed:
        complete_checkpoint(path)
    os.utime(path, (step, step))  # an order of their own, in which the last one is the newest
    return path


def names(folder: Path) -> list[str]:
    return sorted((path.name for path in checkpoints_in(folder)), key=lambda name: int(name.split("-")[1]))


def killed_while_removing(path: Path, files: int, monkeypatch) -> None:
    """Remove a checkpoint, and die when so many of its files are gone."""
    left = itertools.count()
    unlink = os.unlink

    def dying(*args, **kwargs):
        if next(left) == files:
            raise Killed
        unlink(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", dying)
        with pytest.raises(Killed):
            remove_checkpoint(path)


# ---- Half checkpoints ----


@pytest.mark.parametrize("gone", [0, 1, 2, 3])
def test_a_kill_while_a_checkpoint_goes_leaves_none_that_looks_like_one(tmp_path, monkeypatch, gone):
    for step in (2, 4, 6):
        make_checkpoint(tmp_path, step)
    killed_while_removing(tmp_path / "checkpoint-2", gone, monkeypatch)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-6"]
    assert [path.name for path in tmp_path.glob(".checkpoint-*")] == [".checkpoint-2.removed"]
    assert rotate(tmp_path, 2, None) == []  # nothing to name: nobody takes it for a checkpoint
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-4", "checkpoint-6"]


# As an older version, or transformers, was killed: some files, in whatever order the system lists them
HALVES = {
    "the list is left": ["ama_files.json"],
    "the list and the state are left": ["ama_files.json", "trainer_state.json"],
    "all but the weights": ["ama_files.json", "trainer_state.json", "optimizer.pt"],
    "the list went first": ["weights.safetensors", "optimizer.pt"],
    "nothing is left": [],
}


@pytest.mark.parametrize("left", HALVES)
def test_half_a_checkpoint_counts_for_nothing(tmp_path, left):
    for step in (2, 4, 6):
        make_checkpoint(tmp_path, step)
    half = tmp_path / "checkpoint-2"
    for path in list(half.iterdir()):
        if path.name not in HALVES[left]:
            path.unlink()
    os.utime(half)  # what removing a file does: now it is the newest
    spoiled = tmp_path.parent / f"{tmp_path.name}-transformers"
    shutil.copytree(tmp_path, spoiled)
    for path in tmp_path.iterdir():
        shutil.copystat(path, spoiled / path.name)
    rotate_checkpoints(str(spoiled), 2, None, use_mtime=True)
    assert names(spoiled) == ["checkpoint-2", "checkpoint-6"]  # why this matters: a good one went
    [(path, reason)] = rotate(tmp_path, 2, None)
    assert path == half and "stopped while it was removed" in reason
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-6"]
    assert newest_good_checkpoint(tmp_path).good.name == "checkpoint-6"


def test_what_was_not_written_to_the_end_goes_too(tmp_path):
    make_checkpoint(tmp_path, 2)
    begin_checkpoint(tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / "weights.safetensors").write_bytes(b"1")
    assert "while it was written" in half_of(tmp_path / "checkpoint-4")
    assert [path.name for path, _ in remove_halves(tmp_path)] == ["checkpoint-4"]
    assert names(tmp_path) == ["checkpoint-2"]


def test_whole_ones_stay_whatever_wrote_them(tmp_path):
    """Of TRL, without a list; with a flipped bit, which somebody may want to look at; without a limit."""
    make_checkpoint(tmp_path, 2, listed=False)
    damaged = make_checkpoint(tmp_path, 4)
    (damaged / "weights.safetensors").write_bytes(b"\1" * 4)
    (make_checkpoint(tmp_path, 6) / "ama_files.json").write_text('{"cut')
    (tmp_path / "checkpoint-best").mkdir()
    assert remove_halves(tmp_path) == [] and rotate(tmp_path, None, None) == rotate(tmp_path, 0, None) == []
    assert (
        names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"] and (tmp_path / "checkpoint-best").is_dir()
    )


@pytest.mark.parametrize("limit", [1, 2, 3, 5])
@pytest.mark.parametrize("best", [None, 2, 4, 10])
@pytest.mark.parametrize("clock", ["in order", "no times"])
def test_whole_ones_go_as_transformers_chooses(tmp_path, limit, best, clock):
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        for step in (2, 4, 10):
            os.utime(make_checkpoint(folder, step), (step, step) if clock == "in order" else (7, 7))
        (folder / "checkpoint-best").mkdir()  # somebody's own
        os.utime(folder / "checkpoint-best", (1, 1))
    named = {folder: best and str(tmp_path / folder / f"checkpoint-{best}") for folder in ("ours", "theirs")}
    rotate(tmp_path / "ours", limit, named["ours"])
    rotate_checkpoints(str(tmp_path / "theirs"), limit, named["theirs"], use_mtime=True)
    assert names(tmp_path / "ours") == names(tmp_path / "theirs")


def test_a_training_goes_on_beside_a_half_checkpoint(training, tmp_path, caplog):
    """It is named and removed when the training is resumed, and no good one goes for it."""
    training("run", max_steps=4, save_total_limit=2).train()
    run = tmp_path / "run"
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-1")
    (run / "checkpoint-1" / "optimizer.pt").unlink()
    os.utime(run / "checkpoint-1")
    with caplog.at_level(logging.WARNING):
        trainer = training("run", max_steps=6, save_total_limit=2)
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6
    assert names(run) == ["checkpoint-4", "checkpoint-6"]
    assert "checkpoint-1' is not used and is removed: a part of its files is gone" in caplog.text


def test_a_training_that_is_killed_while_it_rotates(training, tmp_path, monkeypatch):
    """In the middle of removing `checkpoint-2`: the resumed run ends with the two that it should have."""
    removed = []

    def half(path):
        if path.name == "checkpoint-2":
            removed.append(path)
            killed_while_removing(path, 2, monkeypatch)
            raise Killed
        remove_checkpoint(path)

    monkeypatch.setattr(checkpoints, "remove_checkpoint", half)
    with pytest.raises(Killed):
        training("run", save_total_limit=2).train()
    monkeypatch.undo()
    run = tmp_path / "run"
    assert removed and names(run) == ["checkpoint-4", "checkpoint-6"] and (run / ".checkpoint-2.removed").is_dir()
    trainer = training("run", save_total_limit=2)
    trainer.train(resume_from_checkpoint=True)
    assert names(run) == ["checkpoint-6", "checkpoint-7"] and trainer.state.global_step == 7
    assert not list(run.glob(".*"))


# ---- Files that were being written ----


def killed_while_writing(write, monkeypatch) -> None:
    """Die between writing a file and giving it its name; what a handler would still do is left out, too."""

    def die(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        patch.setattr(os, "rename", die)
        patch.setattr(Path, "unlink", lambda *args, **kwargs: None)
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        with pytest.raises(Killed):
            write()


def left_in(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob(".*") if ".locks" not in path.parts]


def test_the_next_run_removes_what_a_killed_one_was_writing(tmp_path, monkeypatch):
    page = '<meta name="generator" content="trl-ama">'
    killed_while_writing(lambda: write_file(tmp_path / "results.json", b"{}"), monkeypatch)
    killed_while_writing(lambda: write_file(tmp_path / "specialists" / "list" / "stage.json", b"{}"), monkeypatch)
    killed_while_writing(lambda: save_page(tmp_path / "report" / "index.html", page), monkeypatch)
    (tmp_path / "reference_losses" / ".list.partial").mkdir(parents=True)
    (tmp_path / "reference_losses" / ".list.partial" / "train.parquet").write_bytes(b"PAR1")
    (tmp_path / ".margins.parquet.partial").write_bytes(b"PAR1")
    (tmp_path / "notes.partial").write_text("the user's")
    assert len(left_in(tmp_path)) == 5
    with folder_held(tmp_path, ["code"]):  # a job of one task: another one may be writing
        assert len(left_in(tmp_path)) == 5
    with folder_held(tmp_path, ["list"]):  # its own
        assert [name.split(".")[1] for name in sorted(left_in(tmp_path))] == ["margins", "results", "index"]
    with folder_held(tmp_path):
        assert left_in(tmp_path) == []
        write_file(tmp_path / "results.json", b"{}")
    assert (tmp_path / "notes.partial").read_text() == "the user's"


def test_a_page_removes_those_that_never_came_into_their_place(tmp_path, monkeypatch):
    page = '<meta name="generator" content="trl-ama">'
    path = tmp_path / "page.html"
    killed_while_writing(lambda: save_page(path, page), monkeypatch)
    [left] = left_in(tmp_path)
    save_page(path, page)
    assert left_in(tmp_path) == [left]  # another process's, perhaps, that is at work
    old = time.time() - 3600
    os.utime(tmp_path / left, (old, old))
    (tmp_path / ".page.html.notes").write_text("the user's")
    os.utime(tmp_path / ".page.html.notes", (old, old))
    save_page(path, page)
    assert left_in(tmp_path) == [".page.html.notes"] and path.read_text() == page


def test_a_merge_removes_what_a_killed_one_left(tmp_path, monkeypatch):
    def merge():
        with whole_or_not(tmp_path / "merged", overwrite=True) as folder:
            (folder / NOTE_FILE).write_text("{}")

    killed_while_writing(merge, monkeypatch)
    [left] = left_in(tmp_path)
    old = time.time() - 3 * 24 * 3600
    os.utime(tmp_path / left, (old, old))
    merge()
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_everything_that_is_written_ends_alike():
    """So that one rule finds it: no other temporary name is in the package."""
    sources = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in PACKAGE.rglob("*.py")}
    temporary = [name for name, text in sources.items() if "tempfile.mk" in text or "NamedTemporaryFile" in text]
    # Of these, the trainer for itself
    assert sorted(temporary) == ["common/files.py", "dpo/pair_trainer.py", "merge/folder.py"]
    assert "tempfile" not in sources["report/page.py"]


# ---- A folder without tasks ----


def no_tasks(**kwargs) -> str:
    with pytest.raises(AMAError) as caught:
        read_tasks(TaskMixtureConfig(**kwargs))
    return str(caught.value)


def test_a_folder_of_pairs_without_tasks_says_what_it_holds(tmp_path):
    assert "pass `--tasks`" in no_tasks()
    assert "is empty" in no_tasks(tasks_dir=str(tmp_path))
    assert "cannot be read (No such file" in no_tasks(tasks_dir=str(tmp_path / "gone"))
    (tmp_path / "pairs.txt").write_text("")
    assert "holds 'pairs.txt'. Name the files of a task `<task>_train.jsonl`" in no_tasks(tasks_dir=str(tmp_path))
    for name in (
        "code_train.jsonl",
        "code_test.jsonl",
        "be brief_train.parquet",
        "max_train.jsonl.gz",
        ".x_train.jsonl",
    ):
        (tmp_path / name).write_text("")
    text = no_tasks(tasks_dir=str(tmp_path))
    assert "holds files of 'be brief', 'code', 'max'" in text
    assert "`tasks: [{task: be brief}, {task: code}, {task: max}]`" in text


def test_the_tasks_that_it_names_are_taken(tmp_path):
    for task in ("code", "max"):
        (tmp_path / f"{task}_train.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    text = no_tasks(tasks_dir=str(tmp_path))
    entries = [{"task": name} for name in ("code", "max")]
    assert str(entries).replace("'", "") in text
    pairs = read_tasks(TaskMixtureConfig(tasks=entries, tasks_dir=str(tmp_path))).pairs
    assert pairs["train"].features["task"].names == ["code", "max"]
