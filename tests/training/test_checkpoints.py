"""Checkpoints and finished models that are damaged are noticed and named; a save that fails leaves what was there before."""

import json
import logging
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
from hub_world import parse
from resumed_runs import assert_same, copy_fixture, finished_fixture, recipe_fixture, training_fixture  # noqa: F401 - fixtures
from tiny_pairs import make_dataset, with_reference_columns
from tiny_runs import losses_of

from trl_ama import AMAError, run_pipeline
from trl_ama.common.files import read_json, sealed, write_json
from trl_ama.training import exact_resume
from trl_ama.training.checkpoints import (
    MANIFEST,
    begin_checkpoint,
    complete_checkpoint,
    damage_of,
    newest_good_checkpoint,
)
from trl_ama.training.stage import read_stage, result_in


def flip(path: Path, position: float = 0.5) -> None:
    """Change one bit of a file, and nothing of its size."""
    content = bytearray(path.read_bytes())
    content[int(position * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# ---- Files alone ----


@pytest.fixture
def folder(tmp_path):
    """A training with three checkpoints."""
    for step in (2, 4, 10):
        path = tmp_path / f"checkpoint-{step}"
        begin_checkpoint(path)
        (path / "inner").mkdir()
        (path / "weights.bin").write_bytes(bytes(range(200)))
        (path / "inner" / "more.bin").write_bytes(b"more")
        write_json(path / "trainer_state.json", {"global_step": step})
        complete_checkpoint(path)
    return tmp_path


def test_the_newest_is_the_one_with_most_steps(folder):
    found = newest_good_checkpoint(folder)
    assert found.good.name == "checkpoint-10" and found.step == 10 and not found.bad
    assert not newest_good_checkpoint(folder / "checkpoint-2").good


DAMAGES = {
    "cut off": (lambda path: cut(path / "weights.bin"), "'weights.bin' has 100 bytes and was written with 200"),
    "one bit": (lambda path: flip(path / "weights.bin"), "'weights.bin' is not what was written"),
    "one bit below": (lambda path: flip(path / "inner" / "more.bin"), "'inner/more.bin' is not what was written"),
    "a file missing": (lambda path: (path / "weights.bin").unlink(), "'weights.bin' is missing"),
    "the list damaged": (lambda path: flip(path / MANIFEST), f"'{MANIFEST}' is damaged"),
    "the list cut off": (lambda path: cut(path / MANIFEST), f"'{MANIFEST}' is damaged"),
    "the list missing": (lambda path: (path / MANIFEST).unlink(), "incomplete"),
    "not finished": (begin_checkpoint, "incomplete"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(folder, damage):
    damages, reason = DAMAGES[damage]
    damages(folder / "checkpoint-10")
    found = newest_good_checkpoint(folder)
    assert found.good.name == "checkpoint-4"
    assert [path.name for path, _ in found.bad] == ["checkpoint-10"] and reason in found.bad[0][1]


def test_every_bit_of_the_list_counts(folder):
    path = folder / "checkpoint-10" / MANIFEST
    content = path.read_bytes()
    for position in range(len(content)):
        for bit in (1, 32):  # 32 makes lower case of upper case
            path.write_bytes(content[:position] + bytes([content[position] ^ bit]) + content[position + 1 :])
            try:
                damaged = damage_of(path.parent) is not None
            except AMAError as error:
                assert "version" in str(error)
                continue
            assert damaged or json.loads(path.read_bytes()) == json.loads(content)  # white space


def test_a_checkpoint_whose_best_is_gone_is_not_used(folder):
    for step, best in ((4, 2), (10, 4)):
        path = folder / f"checkpoint-{step}"
        named = f"/elsewhere/run/checkpoint-{best}"
        write_json(path / "trainer_state.json", {"best_global_step": best, "best_model_checkpoint": named})
        complete_checkpoint(path)
    flip(folder / "checkpoint-4" / "weights.bin")
    assert newest_good_checkpoint(folder).good.name == "checkpoint-10"
    found = newest_good_checkpoint(folder, best=True)
    assert found.good.name == "checkpoint-2"
    assert "'checkpoint-4', its file 'weights.bin' is not what was written" in found.bad[0][1]
    shutil.rmtree(folder / "checkpoint-4")
    assert "'checkpoint-4', is gone" in newest_good_checkpoint(folder, best=True).bad[0][1]


def test_a_checkpoint_of_a_newer_version_is_refused_by_name(folder):
    write_json(folder / "checkpoint-10" / MANIFEST, sealed({"version": 7, "complete": True}))
    with pytest.raises(AMAError, match=r"checkpoint-10' is of version 7, this trl-ama reads version 1"):
        newest_good_checkpoint(folder)


# ---- Trainings ----


@pytest.mark.parametrize(
    "settings",
    [
        {"mixing": "proportional", "logging_strategy": "epoch"},
        {"eval_strategy": "epoch", "eval_on_start": True, "disable_dropout": False},
        {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_total_limit": 2,
         "metric_for_best_model": "eval_worst_excess", "greater_is_better": False},
    ],
    ids=["logged at epochs", "evaluated at epochs", "best"],
)  # fmt: skip
def test_a_resumed_run_has_the_same_log(training, tmp_path, settings):
    """Also from the last checkpoint, from that of an epoch's last step, and where figures wait for the next log entry."""
    settings = {**settings, "save_steps": 1}
    everything = {**settings, "save_total_limit": None}
    whole = training("whole", **everything)
    output = whole.train()
    assert output.training_loss == output.metrics["train_loss"]
    for step in (4, 5, 7):
        shutil.rmtree(tmp_path / "resumed", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
        for path in (tmp_path / "resumed").glob("checkpoint-*"):
            if int(path.name.split("-")[1]) > step:
                shutil.rmtree(path)
        resumed = training("resumed", **settings)
        again = resumed.train(resume_from_checkpoint=True)
        assert again.global_step == 7 and again.training_loss == output.training_loss
        assert_same(resumed, whole)


def test_other_draws_are_refused_with_the_reason(training, tmp_path, caplog):
    """Where draws are by epochs it is not the sampler that would notice. A trainer of the user's own goes on as DPOTrainer's."""
    training("whole", mixing="proportional", max_steps=2).train()
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    for settings, text in (
        ({"per_device_train_batch_size": 8}, "pairs per optimizer step 8, this run has 16"),
        (
            {"rows": with_reference_columns(make_dataset({"list": 30, "sort": 12}))},
            "number of training pairs 40, this run has 42",
        ),
        ({"seed": 8}, "seed 7, this run has 8"),
    ):
        other = training("other", **{"mixing": "proportional", "max_steps": 4, **settings})
        other.stage_name = "a stage of a pipeline"
        with pytest.raises(AMAError, match=text):
            other.train(checkpoint)
        other.stage_name = None
        with caplog.at_level(logging.WARNING):
            other.train(checkpoint)
        assert text in caplog.text and other.state.global_step == 4
    same = training(
        "same", mixing="proportional", max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    same.train(checkpoint)
    whole = training("undisturbed", mixing="proportional", max_steps=4)
    whole.train()
    assert losses_of(same) == pytest.approx(losses_of(whole), abs=1e-4)


def test_a_damaged_checkpoint_is_refused_or_passed_over(training, tmp_path, caplog):
    whole = training("whole")
    whole.train()
    newest = tmp_path / "whole" / "checkpoint-7"
    flip(newest / "optimizer.pt")
    with pytest.raises(
        AMAError, match=r"checkpoint-7' cannot be used: its file 'optimizer.pt' is not.*Resume from '.*-6'"
    ):
        training("whole").train(resume_from_checkpoint=str(newest))
    resumed = training("whole")
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=True)
    assert f"The checkpoint '{newest}' is not used: its file 'optimizer.pt' is not what was written." in caplog.text
    assert_same(resumed, whole)
    assert damage_of(newest) is None  # written again
    for path in (tmp_path / "whole").glob("checkpoint-*"):
        flip(path / "adapter_model.safetensors")
    with pytest.raises(AMAError, match=r"None of the 4 checkpoints .* can be used; of the newest, its file"):
        training("whole").train(resume_from_checkpoint=True)


def test_a_damaged_best_checkpoint_is_not_loaded(training, tmp_path, monkeypatch):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "max_steps": 4}
    trainer = training("run", **settings)

    def damaging(*args):
        flip(Path(trainer.state.best_model_checkpoint, "adapter_model.safetensors"))
        return trainer_load()

    trainer_load, trainer._load_best_model = trainer._load_best_model, damaging
    with pytest.raises(
        AMAError, match=r"The best checkpoint '.*' cannot be used: its file 'adapter_model.safetensors'"
    ):
        trainer.train()


def test_no_older_checkpoint_goes_before_the_new_one_is_complete(training, tmp_path, monkeypatch):
    there = []
    complete = exact_resume.complete_checkpoint

    def looking(folder, lacks=None):
        there.append(sorted(path.name for path in folder.parent.glob("checkpoint-*")))
        complete(folder, lacks)

    monkeypatch.setattr(exact_resume, "complete_checkpoint", looking)
    trainer = training("run", save_total_limit=1)
    trainer.train()
    names = [
        ["checkpoint-2"],
        ["checkpoint-2", "checkpoint-4"],
        ["checkpoint-4", "checkpoint-6"],
        ["checkpoint-6", "checkpoint-7"],
    ]
    assert there == names
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-7"]
    assert trainer.args.save_total_limit == 1
    assert (
        torch.load(tmp_path / "run" / "checkpoint-7" / "training_args.bin", weights_only=False).save_total_limit == 1
    )


@pytest.mark.parametrize("largest", ["optimizer.pt", "adapter_model.safetensors"])
def test_a_full_disk_leaves_the_checkpoint_before(training, tmp_path, monkeypatch, largest):
    """Writing fails in torch or in safetensors, as it does beyond a quota."""
    whole = training("whole", max_steps=4)
    whole.train()
    size = (tmp_path / "whole" / "checkpoint-4" / largest).stat().st_size
    trainer, limits = training("run", max_steps=4), resource.getrlimit(resource.RLIMIT_FSIZE)
    begin = exact_resume.begin_checkpoint

    def limited(folder):
        begin(folder)
        if folder.name == "checkpoint-4":
            resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, limits[1]))

    monkeypatch.setattr(exact_resume, "begin_checkpoint", limited)
    try:
        with pytest.raises(AMAError) as caught:
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "checkpoint-4' could not be written" in str(caught.value)
    assert "'checkpoint-2' is intact: make room on the disk, and run again" in str(caught.value)
    assert not (tmp_path / "run" / "checkpoint-4").exists()
    monkeypatch.undo()
    resumed = training("run", max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert_same(resumed, whole)


# ---- The pipeline's stages ----


@pytest.mark.parametrize(
    ("name", "damages"),
    [
        ("adapter_model.safetensors", flip),
        ("adapter_config.json", Path.unlink),
        ("trainer_state.json", flip),
    ],
)
def test_a_damaged_specialist_is_made_again(copy, recipe, finished, caplog, name, damages):
    path = copy / "specialists" / "list" / name
    before = path.read_bytes()
    damages(path)
    assert result_in(path.parent) is None
    with caplog.at_level(logging.WARNING):
        results = run_pipeline(*parse(recipe, "--output_dir", copy))
    told = [record.getMessage() for record in caplog.records if "is damaged" in record.getMessage()]
    assert len(told) == 1 and f"'{path.parent}'" in told[0] and f"'{name}'" in told[0]
    assert results == finished[1]
    if name == "adapter_model.safetensors":
        assert path.read_bytes() == before


def test_a_damaged_specialist_without_checkpoints_is_trained_again(copy, recipe, finished):
    folder = copy / "specialists" / "list"
    before = (folder / "adapter_model.safetensors").read_bytes()
    flip(folder / "adapter_model.safetensors")
    for path in folder.glob("checkpoint-*"):
        flip(path / "optimizer.pt")
    assert run_pipeline(*parse(recipe, "--output_dir", copy)) == finished[1]
    assert (folder / "adapter_model.safetensors").read_bytes() == before


def test_a_damaged_generalist_is_made_again(copy, recipe, finished):
    path = copy / "generalists" / "ama_s" / "adapter_model.safetensors"
    before = path.read_bytes()
    flip(path)
    with pytest.raises(AMAError, match="The generalist 'ama_s' is not there to be evaluated"):
        run_pipeline(*parse(recipe, "--output_dir", copy), stages=("eval",))
    assert run_pipeline(*parse(recipe, "--output_dir", copy)) == finished[1]
    assert path.read_bytes() == before


@pytest.mark.parametrize("damages", [flip, cut])
def test_damaged_reference_losses_are_computed_again(copy, recipe, finished, caplog, damages):
    path = copy / "reference_losses" / "sort" / "train.parquet"
    before = path.read_bytes()
    damages(path)
    with pytest.raises(AMAError, match=r"'train.parquet'"):
        run_pipeline(*parse(recipe, "--output_dir", copy), stages=("eval",))
    assert run_pipeline(*parse(recipe, "--output_dir", copy)) == finished[1]
    assert "task 'sort'" in caplog.text and "'train.parquet' is not what was written" in caplog.text
    assert path.read_bytes() == before


def test_every_bit_of_the_notes_counts(copy):
    """None of them changes what the pipeline sees and goes unnoticed."""
    path = copy / "generalists" / "ama_s" / "stage.json"
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        try:
            note = read_stage(path.parent)
        except AMAError as error:
            assert str(path) in str(error)
            continue
        assert note == json.loads(content)  # white space


def test_damaged_results_are_made_again(copy, recipe, finished):
    path = copy / "results.json"
    text = path.read_text()
    digit = re.search(r'"margin": -?\d+\.(\d)', text).start(1)
    path.write_text(text[:digit] + str((int(text[digit]) + 1) % 10) + text[digit + 1 :])
    with pytest.warns(UserWarning, match=r"results.json' is damaged"):
        assert run_pipeline(*parse(recipe, "--output_dir", copy)) == finished[1]
    assert read_json(path) == finished[1]


def test_notes_of_older_versions_are_read(copy, recipe, finished, monkeypatch):
    """Stages and checkpoints as they were before they had lists of their files."""
    for path in copy.glob("*/*/stage.json"):
        note = read_json(path)
        write_json(path, {key: note[key] for key in ("fingerprint", "result")})
    for path in copy.glob(f"*/*/checkpoint-*/{MANIFEST}"):
        path.unlink()
    note = read_json(copy / "generalists" / "ama_s" / "stage.json")
    write_json(copy / "generalists" / "ama_s" / "stage.json", {**note, "result": None})
    shutil.rmtree(copy / "generalists" / "ama_s" / "checkpoint-4")
    resumed = []
    train = exact_resume.ExactResume.train

    def noting(self, resume_from_checkpoint=None):
        resumed.append(resume_from_checkpoint)
        return train(self, resume_from_checkpoint)

    monkeypatch.setattr(exact_resume.ExactResume, "train", noting)
    assert run_pipeline(*parse(recipe, "--output_dir", copy)) == finished[1]
    assert [Path(name).name for name in resumed] == ["checkpoint-2"]


def test_what_cannot_be_continued_exactly_begins_again(recipe, tmp_path, monkeypatch, caplog, finished):
    """A checkpoint without the optimizer's state would go on to other numbers."""
    flags = ["--output_dir", tmp_path / "run", "--save_only_model", "true"]
    monkeypatch.setattr("trl_ama.training.stage.TrainingStage._save", lambda *args: pytest.fail("stopped"))
    with pytest.raises(pytest.fail.Exception):
        run_pipeline(*parse(recipe, *flags))
    monkeypatch.undo()
    run_pipeline(*parse(recipe, *flags), stages=("specialists",))
    assert "it lacks the optimizer's state (save_only_model)" in caplog.text
    name = "specialists/list/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (finished[0] / name).read_bytes()


def test_checkpoints_of_another_training_are_not_taken_for_this_one(copy, recipe, finished):
    """Somebody deleted the note, to have the stage done again."""
    folder = copy / "specialists" / "list"
    (folder / "stage.json").unlink()
    (folder / "checkpoint-4").rename(folder / "checkpoint-3")
    assert run_pipeline(*parse(recipe, "--output_dir", copy)) == finished[1]
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
