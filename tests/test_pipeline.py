"""The stages end to end on a tiny model, what a second run does, and what each stage refuses."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset
from safetensors.numpy import load_file, save_file
from state_versions import refused, with_version
from tiny_models import lora, make_model
from tiny_pairs import make_rows
from trl import DPOTrainer
from whole_runs import SIZES, data_dir_fixture, recipe_fixture  # noqa: F401 - fixtures

from trl_ama import AMAError, AMATrainer, join_reference_losses, run_pipeline
from trl_ama.html_report import collect
from trl_ama.loss_dataset import read_note
from trl_ama.loss_loading import load_reference_losses
from trl_ama.reference_columns import LOGP_COLUMNS
from trl_ama.report import result_table
from trl_ama.run_losses import joined_data
from trl_ama.run_settings import RunSettings
from trl_ama.run_start import check_recipe
from trl_ama.safe_files import describe_files, read_json, sealed, write_json
from trl_ama.specialists import quality_warning
from trl_ama.versions import VERSIONS


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    """A finished run; tests copy it before they change it."""
    output_dir = tmp_path_factory.mktemp("run")
    results = run_pipeline(*recipe(output_dir))
    return output_dir, results


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(DPOTrainer, "train", lambda *args, **kwargs: pytest.fail("something was trained"))


def test_what_a_run_leaves(finished):
    output_dir, results = finished
    assert results == read_json(output_dir / "results.json")
    assert list(results["policies"]) == ["base", "specialists", "ama_s", "proportional"]
    base, specialists = results["policies"]["base"], results["policies"]["specialists"]
    for task in SIZES:
        assert base["by_task"][task]["accuracy"] == 0.5
        assert base["by_task"][task]["loss"] == pytest.approx(np.log(2))
        assert specialists["by_task"][task]["excess"] == 0
        assert base["by_task"][task]["pairs"] == 20
    assert specialists["by_task"]["brief"]["accuracy"] > 0.8
    for name in ("ama_s", "proportional"):
        summary, by_task = results["policies"][name]["summary"], results["policies"][name]["by_task"]
        assert summary["worst_accuracy"] == min(by_task[task]["accuracy"] for task in SIZES)
        assert summary["worst_excess"] == max(by_task[task]["excess"] for task in SIZES)
        assert by_task["brief"]["accuracy"] > 0.5
        assert (output_dir / "generalists" / name / "adapter_model.safetensors").is_file()
    assert (output_dir / "plots" / "mixture.png").read_bytes().startswith(b"\x89PNG")
    table = (output_dir / "results.md").read_text()
    assert "| **worst task**" in table and "| mean of tasks" in table
    card = (output_dir / "generalists" / "ama_s" / "README.md").read_text()
    assert result_table(results, this="ama_s").strip() in card
    assert "this model (ama_s)" in card and "mixture.png" in card and "tags:" in card
    assert str(output_dir) not in card


def test_a_second_run_finds_everything_done(copy, recipe, finished, no_training, capsys):
    assert run_pipeline(*recipe(copy)) == finished[1]
    printed = capsys.readouterr().out
    assert printed.count(" done") == 3 + 3 + 2 and "to do" not in printed


def test_the_plan_comes_first(recipe, tmp_path, monkeypatch, capsys):
    class Stop(Exception):
        pass

    def stop(*args):
        raise Stop

    monkeypatch.setattr("trl_ama.pipeline.train_specialists", stop)
    with pytest.raises(Stop):
        run_pipeline(*recipe(tmp_path))
    printed = capsys.readouterr().out
    assert "3 tasks, 108 training pairs, 60 held out" in printed
    assert printed.count("to do") == 3 + 3 + 2


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (
            ["--learning_rate", "0.001"],
            r"specialist of task 'list'.*made with learning_rate=0.005.*has learning_rate=0.001",
        ),
        (["--specialist_args", "{max_steps: 13}"], r"made with max_steps=12, but this run has max_steps=13"),
        (["--max_train_pairs", "8"], r"specialist of task 'list'.*made with pairs="),
        (["--lora_r", "8"], r"made with lora_r=4, but this run has lora_r=8"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(copy, recipe, no_training, flags, text):
    with pytest.raises(AMAError, match=text) as caught:
        run_pipeline(*recipe(copy, *flags))
    assert "another output_dir" in str(caught.value)


def test_only_the_mixing_changed(copy, recipe, no_training):
    """Specialists and reference losses serve any mixing; the generalist of that name does not."""
    with pytest.raises(
        AMAError, match=r"The generalist 'ama_s'.*made with smoothing=0.1, but this run has smoothing=0.3"
    ):
        run_pipeline(*recipe(copy, "--smoothing", "0.3"))


def test_another_beta_needs_no_scoring(copy, recipe, monkeypatch):
    monkeypatch.setattr(
        "trl_ama.loss_scoring.score_reference_and_specialist", lambda *args: pytest.fail("pairs were scored again")
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


def test_training_without_reference_losses(copy, recipe, no_training):
    shutil.rmtree(copy / "reference_losses" / "sort")
    shutil.rmtree(copy / "generalists")
    with pytest.raises(
        AMAError, match=r"'sort' has no reference losses; found \['brief', 'list'\]. Run `trl ama-losses"
    ):
        run_pipeline(*recipe(copy), stages=("train",))


def test_a_damaged_loss_file_is_named(copy, recipe, no_training):
    path = copy / "reference_losses" / "list" / "train.parquet"
    path.write_bytes(path.read_bytes()[:200])
    shutil.rmtree(copy / "generalists")
    with pytest.raises(AMAError, match="reference losses in .* cannot be read"):
        run_pipeline(*recipe(copy), stages=("train",))


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (
            ["--ld_alpha", "0.1"],
            "reference losses of task 'list'.*made with ld_alpha=None, but this run has ld_alpha=0.1",
        ),
        (["--dtype", "bfloat16"], "made with dtype='float32', but this run has dtype='bfloat16'"),
        (
            ["--mixing", "ama_r"],
            r"'ama_r' is not there to be evaluated .*; found \['proportional'\].*trl ama --config",
        ),
        (["--smoothing", "0.2"], "generalist 'ama_s'.*made with smoothing=0.1, but this run has smoothing=0.2"),
        (["--max_eval_pairs", "5"], "reference losses of task 'list'.*made with test_pairs="),
    ],
)
def test_evaluating_with_other_settings_is_refused(copy, recipe, flags, text):
    before = (copy / "results.md").read_text()
    with pytest.raises(AMAError, match=text):
        run_pipeline(*recipe(copy, *flags), stages=("eval",))
    assert (copy / "results.md").read_text() == before


def test_a_specialist_trained_again_is_the_same(copy, recipe, monkeypatch):
    """Same settings, same weights: the reference losses still hold, whatever was printed or logged meanwhile."""
    monkeypatch.setattr(
        "trl_ama.loss_scoring.score_reference_and_specialist", lambda *args: pytest.fail("pairs were scored again")
    )
    shutil.rmtree(copy / "specialists" / "sort")
    run_pipeline(
        *recipe(copy, "--logging_steps", "5", "--run_name", "again"), stages=("specialists", "losses", "train")
    )


def test_specialists_are_the_same_from_another_folder(finished, recipe, tmp_path, model_dir):
    """Bases are known by their weights, where the run noted them, not by where they lay."""
    shutil.copytree(model_dir, tmp_path / "elsewhere")
    sources = {task: str(finished[0] / "specialists" / task) for task in SIZES}
    flags = ["--model_name_or_path", tmp_path / "elsewhere", "--specialists", json.dumps(sources)]
    run_pipeline(*recipe(tmp_path / "run", *flags), stages=("losses",))
    stranger = tmp_path / "stranger"
    shutil.copytree(model_dir, stranger)
    make_model(26, seed=9).save_pretrained(stranger)
    flags[1] = stranger
    with pytest.raises(AMAError, match="is an adapter of .*, but this run's base model is"):
        run_pipeline(*recipe(tmp_path / "run", *flags), stages=("losses",))


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


def test_a_stopped_specialist_goes_on_from_its_checkpoint(recipe, finished, tmp_path, monkeypatch):
    output_dir = tmp_path / "run"
    steps = []
    original = DPOTrainer.training_step

    def count(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if len(steps) == 10:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(DPOTrainer, "training_step", count)
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(*recipe(output_dir), stages=("specialists",))
    assert (output_dir / "specialists" / "list" / "checkpoint-8").is_dir()
    run_pipeline(*recipe(output_dir), stages=("specialists",))
    assert steps[10:14] == [8, 9, 10, 11]
    adapter = Path("specialists", "list", "adapter_model.safetensors")
    assert (output_dir / adapter).read_bytes() == (finished[0] / adapter).read_bytes()


def test_a_users_own_specialist_is_not_trained(copy, recipe, tmp_path, monkeypatch):
    source = tmp_path / "mine"
    shutil.copytree(copy / "specialists" / "sort", source)
    shutil.rmtree(copy)
    trained = []
    monkeypatch.setattr("trl_ama.specialists.train_specialist", lambda settings, task: trained.append(task) or {})
    run_pipeline(*recipe(copy, "--specialists", json.dumps({"sort": str(source)})), stages=("specialists",))
    assert trained == ["list", "brief"]
    with pytest.raises(AMAError, match=r"specialist for 'sorting', but the recipe's tasks are .* Did you mean 'sort'"):
        run_pipeline(*recipe(copy, "--specialists", json.dumps({"sorting": str(source)})))


def test_quality_warning():
    good = {"eval_loss": 0.5, "base_loss": 0.693, "eval_accuracy": 0.8, "eval_pairs": 100}
    assert quality_warning("list", good) is None
    for worse in ({"eval_loss": 0.7}, {"eval_accuracy": 0.54}):
        text = quality_warning("list", {**good, **worse})
        assert "specialist of task 'list' does not beat the base model on its own 100 held-out pairs" in text
    assert quality_warning("list", {"steps": 3}) is None


def test_a_weak_specialist_is_said_loudly(recipe, tmp_path):
    with pytest.warns(UserWarning, match="does not beat the base model"):
        run_pipeline(
            *recipe(tmp_path, "--specialist_args", "{max_steps: 1, learning_rate: 1.0e-9}"), stages=("specialists",)
        )


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (
            ["--specialist_args", "{learning_rat: 1}"],
            "Unknown training argument 'learning_rat' .*Did you mean 'learning_rate'",
        ),
        (["--model_name_or_path", "org/not-cached"], "base model 'org/not-cached' cannot be read"),
    ],
)
def test_recipes_that_cannot_run(recipe, tmp_path, no_training, flags, text):
    with pytest.raises(AMAError, match=text):
        run_pipeline(*recipe(tmp_path, *flags))


def test_what_the_trainer_would_refuse_is_refused_before_any_specialist(recipe, tmp_path, no_training):
    for flags, text in (
        (["--use_weighting"], "use_weighting"),
        (["--sync_ref_model"], "sync_ref_model moves the reference"),
        (["--train_sampling_strategy", "group_by_length"], "both decide which pairs come next"),
        (
            ["--specialists", json.dumps({"brief": str(tmp_path)})],
            "specialist of task 'brief' at .* is neither an adapter",
        ),
    ):
        with pytest.raises(AMAError, match=text):
            run_pipeline(*recipe(tmp_path / "run", *flags))


def test_arguments_that_a_pipeline_cannot_follow(recipe, tmp_path, no_training):
    with pytest.raises(AMAError, match="finds by itself where each stage was stopped"):
        run_pipeline(*recipe(tmp_path, "--resume_from_checkpoint", "x"))
    arguments = recipe(tmp_path, "--eval_strategy", "steps")
    for task in arguments[3].tasks:
        task.eval_split = None
    arguments[3].tasks_dir = None
    for task in arguments[3].tasks:
        task.path = "json"
        task.data_files = str(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in make_rows("list", 4, 0)))
    with pytest.raises(AMAError, match="eval_strategy is 'steps', but no task has held-out pairs"):
        run_pipeline(*arguments)
    with pytest.raises(AMAError, match="do not go together"):
        run_pipeline(*recipe(tmp_path, "--specialist_args", "{load_best_model_at_end: true}"))


def test_best_generalist_by_its_worst_task(recipe, tmp_path):
    """`save_strategy: best` is the generalist's; specialists have nothing to choose by."""
    flags = ["--eval_strategy", "steps", "--eval_steps", 2, "--save_strategy", "best", "--load_best_model_at_end"]
    flags += ["--metric_for_best_model", "eval_worst_excess", "--greater_is_better", "False"]
    run_pipeline(*recipe(tmp_path, *flags))
    state = read_json(tmp_path / "generalists" / "ama_s" / "trainer_state.json")
    seen = [entry["eval_worst_excess"] for entry in state["log_history"] if "eval_worst_excess" in entry]
    assert len(seen) == 3 and state["best_metric"] == min(seen)


def test_full_fine_tuning(recipe, tmp_path):
    """Specialists and generalists are whole models; the figures are those of what was saved."""
    flags = ["--use_peft", "False", "--learning_rate", "1e-3"]
    results = run_pipeline(*recipe(tmp_path, *flags))
    assert (tmp_path / "specialists" / "list" / "model.safetensors").is_file()
    assert (tmp_path / "generalists" / "ama_s" / "model.safetensors").is_file()
    assert results["policies"]["specialists"]["by_task"]["brief"]["accuracy"] > 0.7
    assert results["policies"]["ama_s"]["by_task"]["brief"]["loss"] < np.log(2)
    assert run_pipeline(*recipe(tmp_path, *flags)) == results


def test_nothing_to_evaluate_on(recipe, copy, no_training, capsys):
    settings = RunSettings(*recipe(copy))
    from trl_ama import evaluate_policies

    del settings.inputs.data["test"]
    with pytest.raises(AMAError, match="No task has held-out pairs"):
        evaluate_policies(settings, {})


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


# ---- Versions ----


def test_every_file_of_a_run_has_its_version(finished):
    folder = finished[0]
    paths = [path for name in VERSIONS for path in folder.rglob(name) if name != "trainer_state.json"]
    assert {path.name for path in paths} == {"stage.json", "results.json", "run.json", "fingerprint.json"}
    assert all(read_json(path)["version"] == VERSIONS[path.name] for path in paths)
    state = max(folder.glob("generalists/ama_s/checkpoint-*/trainer_state.json"))
    assert read_json(state)["stateful_callbacks"]["ama"]["version"] == VERSIONS["trainer_state.json"]


@pytest.mark.parametrize("name", ["specialists/list/stage.json", "generalists/ama_s/stage.json", "results.json"])
def test_a_runs_files(copy, recipe, no_training, finished, name):
    path = copy / name
    with_version(path, 99)
    with pytest.raises(AMAError, match=refused(path.name)) as caught:
        run_pipeline(*recipe(copy))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with_version(path, None)  # as the first releases wrote it
    assert run_pipeline(*recipe(copy))["policies"] == finished[1]["policies"]


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


def test_a_page_leaves_out_what_is_newer(copy):
    with_version(copy / "results.json", 99)
    data = collect(copy)
    assert data["results"] is None
    assert any(
        "results.json is of version 99, newer than this trl-ama, and was left out" in text for text in data["missing"]
    )
