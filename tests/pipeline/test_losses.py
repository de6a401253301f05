"""The stage of reference losses: the trainer's own numbers, of every pair that it keeps, and no others."""

import shutil

import numpy as np
import pytest
from datasets import load_dataset
from safetensors.numpy import load_file, save_file
from state_versions import with_version
from tiny_models import lora
from whole_runs import SIZES, copy_fixture, finished_fixture, no_training_fixture, recipe_fixture  # noqa: F401 - fixtures

from trl_ama import AMAError, AMATrainer, join_reference_losses, run_pipeline
from trl_ama.common.files import describe_files, read_json, sealed, write_json
from trl_ama.pipeline.run_losses import joined_data
from trl_ama.pipeline.start import check_recipe
from trl_ama.recipe.settings import RunSettings
from trl_ama.reference_losses.columns import LOGP_COLUMNS
from trl_ama.reference_losses.files import read_note
from trl_ama.reference_losses.loading import load_reference_losses


def test_another_beta_needs_no_scoring(copy, recipe, monkeypatch):
    monkeypatch.setattr(
        "trl_ama.pipeline.losses.score_reference_and_specialist", lambda *args: pytest.fail("pairs were scored again")
    )
    shutil.rmtree(copy / "generalists")
    flags = ["--beta", "0.2", "--specialist_args", "{max_steps: 12, beta: 0.5}"]
    results = run_pipeline(*recipe(copy, *flags), stages=("losses", "train", "eval"))
    assert results["policies"]["specialists"]["by_task"]["brief"]["loss"] < np.log(2)


def test_reference_losses_of_other_settings_are_refused(copy, recipe, no_training):
    shutil.rmtree(copy / "generalists")
    note = read_json(copy / "reference_losses" / "sort" / "fingerprint.json")
    for field, value in (("tokenizer", "0000"), ("max_length", 128), ("dtype", "bfloat16"), ("specialist", "x@1")):
        changed = {**note, "fingerprint": {**note["fingerprint"], field: value}}
        write_json(copy / "reference_losses" / "sort" / "fingerprint.json", changed)
        with pytest.raises(
            AMAError, match=f"reference losses of task 'sort'.*made with {field}={value!r}, but this run has"
        ):
            run_pipeline(*recipe(copy))


def test_losses_without_specialists(recipe, tmp_path, no_training):
    with pytest.raises(AMAError, match=r"Task 'list' has no specialist in .*; found \[\]. Run `trl ama-specialists"):
        run_pipeline(*recipe(tmp_path), stages=("losses",))


def test_a_damaged_loss_file_is_named(copy, recipe, no_training):
    path = copy / "reference_losses" / "list" / "train.parquet"
    path.write_bytes(path.read_bytes()[:200])
    shutil.rmtree(copy / "generalists")
    with pytest.raises(AMAError, match="reference losses in .* cannot be read"):
        run_pipeline(*recipe(copy), stages=("train",))


def test_prompts_that_fill_max_length(recipe, tmp_path, no_training):
    with pytest.raises(AMAError, match=r"prompts of all 48 pairs of task 'list' fill max_length \(4\) alone"):
        run_pipeline(*recipe(tmp_path, "--max_length", "4"))


def test_keeping_the_end_drops_no_prompt(recipe, tmp_path, no_training):
    """`keep_end` cuts prompts instead of dropping pairs, so the check of their length does not apply."""
    with pytest.warns(FutureWarning, match="keep_end"):
        arguments = recipe(tmp_path, "--max_length", "4", "--truncation_mode", "keep_end")
    check_recipe(RunSettings(*arguments))


def test_only_what_is_missing_is_scored(copy, recipe, monkeypatch):
    """A task's losses come back equal, and the others' files are left alone."""
    folder = copy / "reference_losses"
    before = load_dataset("parquet", data_files=str(folder / "sort" / "train.parquet"), split="train").to_pandas()
    shutil.rmtree(folder / "sort")
    untouched = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    run_pipeline(*recipe(copy), stages=("losses",))
    assert untouched == {path: path.stat().st_mtime_ns for path in untouched}
    after = load_dataset("parquet", data_files=str(folder / "sort" / "train.parquet"), split="train").to_pandas()
    for column in LOGP_COLUMNS:
        np.testing.assert_allclose(before[column], after[column], rtol=1e-6)


def test_the_stages_losses_are_the_trainers_own(finished, recipe):
    """Joined by id, the stored log-probs equal what an AMATrainer computes from the same specialists."""
    settings = RunSettings(*recipe(finished[0]))
    joined = joined_data(settings)["train"]
    trainer = AMATrainer(
        settings.recipe.model_name,
        args=settings.recipe.with_arguments(
            specialists={task: str(settings.folder.specialist(task)) for task in SIZES}, model_init_kwargs=None
        ),
        train_dataset=settings.inputs.data["train"],
        peft_config=lora(),
    )
    own = trainer.train_dataset
    theirs = dict(zip(zip(own["task"], own["pair_id"], strict=True), range(len(own)), strict=True))
    names = [joined.features["task"].names[task] for task in joined["task"]]
    rows = [
        theirs[key]
        for key in zip([own.features["task"].names.index(n) for n in names], joined["pair_id"], strict=True)
    ]
    for column in LOGP_COLUMNS:
        np.testing.assert_allclose(np.asarray(joined[column]), np.asarray(own[column])[rows], rtol=1e-4, atol=1e-4)


def test_joining_is_by_id_not_position(finished, recipe):
    settings = RunSettings(*recipe(finished[0]))
    losses = load_reference_losses(settings.folder.losses)["train"]
    data = settings.inputs.data["train"]
    straight, shuffled = (join_reference_losses(data, part) for part in (losses, losses.shuffle(seed=1)))
    for column in LOGP_COLUMNS:
        assert straight[column][:] == shuffled[column][:]
    with pytest.raises(AMAError, match=r"lack 1 of the 48 pairs of task 'list' \(the first is"):
        join_reference_losses(data, losses.select(range(1, len(losses))))
    without = losses.remove_columns("ref_chosen_logps")
    values = np.asarray(losses["ref_chosen_logps"]).copy()
    values[5] = np.nan
    with pytest.raises(
        AMAError, match="'ref_chosen_logps' of The reference-loss dataset is missing or not finite in 1 of"
    ):
        join_reference_losses(data, without.add_column("ref_chosen_logps", values))


def test_pairs_that_dpo_trainer_drops_are_left_out_by_id(recipe, tmp_path):
    """max_length 7 drops the prompts of five words and keeps those of three and four."""
    arguments = recipe(tmp_path / "run", "--max_length", "7")
    run_pipeline(*arguments)
    settings = RunSettings(*arguments)
    losses = load_reference_losses(settings.folder.losses)
    assert 0 < len(losses["train"]) < len(settings.inputs.data["train"])
    lengths = {len(row["prompt"][0]["content"].split()) for row in losses["train"]}
    assert lengths == {4, 5} - {length for length in (4, 5) if length not in lengths}
    joined = joined_data(settings)["train"]
    assert sorted(joined["pair_id"]) == sorted(losses["train"]["pair_id"])


def test_without_texts(copy, recipe):
    shutil.rmtree(copy / "reference_losses")
    run_pipeline(*recipe(copy, "--include_text", "False"), stages=("losses",))
    path = copy / "reference_losses" / "list" / "train.parquet"
    columns = load_dataset("parquet", data_files=str(path), split="train").column_names
    assert not {"prompt", "chosen", "rejected"} & set(columns) and {"pair_id", *LOGP_COLUMNS} <= set(columns)
    assert len(joined_data(RunSettings(*recipe(copy)))["train"]) == sum(SIZES.values())


def test_a_specialist_that_gives_no_numbers(copy, recipe, no_training):
    path = copy / "specialists" / "sort" / "adapter_model.safetensors"
    save_file({name: weight * np.nan for name, weight in load_file(path).items()}, path)
    # As if the training had ended so; else the file is known to be damaged
    note = read_json(path.with_name("stage.json"))
    note["files"] |= describe_files(path.parent, [path.name])
    write_json(path.with_name("stage.json"), sealed({key: note[key] for key in note if key != "seal"}))
    shutil.rmtree(copy / "reference_losses" / "sort")
    with pytest.raises(
        AMAError, match=r"'.*specialists/sort' gives no finite log-probs of 32 of 32 pairs of task 'sort'"
    ):
        run_pipeline(*recipe(copy), stages=("losses",))
    assert not (copy / "reference_losses" / "sort").exists()


def test_notes_of_reference_losses(copy):
    folder = copy / "reference_losses" / "list"
    with_version(folder / "fingerprint.json", 99)
    with pytest.raises(
        AMAError, match=r"version 99 \('fingerprint.json'\), this trl-ama reads version 2\. Update trl-ama"
    ):
        read_note(folder)
    with_version(folder / "fingerprint.json", 1)  # without the files' hashes
    with pytest.raises(AMAError, match=r"version 1 .* reads version 2\. Use the trl-ama that made them"):
        read_note(folder)
