"""What TensorBoard, Trackio and Weights & Biases keep of a training and of a pipeline, read back from their own files."""

import importlib.util
import json
from pathlib import Path

import pytest
from tiny_pairs import make_dataset, make_rows
from tiny_runs import QUICK
from tracker_files import local_trackers, tensorboard_scalars, trackio_runs, wandb_runs
from transformers.trainer_utils import TrainOutput
from trl import DPOTrainer, ModelConfig, TrlParser

from trl_ama import AMAConfig, AMATrainer, TaskMixtureConfig, run_pipeline
from trl_ama.common.files import write_json
from trl_ama.recipe.arguments import PipelineArguments
from trl_ama.training.stage import TrainingStage


TRACKERS = [name for name in ("tensorboard", "trackio", "wandb") if importlib.util.find_spec(name) is not None]
SIZES = {"list": 16, "brief": 8}
SECRET = "hf_aVerySecretToken"
STAGES = ("specialist-list", "specialist-brief", "generalist-ama_s")


def need(tracker: str) -> None:
    if tracker not in TRACKERS:
        pytest.skip(f"{tracker} is not installed")


@pytest.fixture(scope="module")
def _local_trackers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trackers")
    with local_trackers(folder):
        yield folder


def new_trainer(model_dir: str, args: AMAConfig, **kwargs) -> AMATrainer:
    return AMATrainer(model_dir, args=args, train_dataset=make_dataset(SIZES), **kwargs)


def check_history(logged: list[dict], trainer: AMATrainer) -> None:
    """A tracker has each figure of each task, at its step and under TRL's prefixes."""
    by_step = {}
    for entry in logged:
        by_step.setdefault(entry["train/global_step"], {}).update(entry)
    train = [entry for entry in trainer.state.log_history if "loss" in entry]
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in train] == [1, 2, 3, 4] and len(evaluations) == 2
    for prefix, own, entries in (("train/", "", train), ("eval/", "eval_", evaluations)):
        for entry in entries:
            figures = {key: value for key, value in entry.items() if key.startswith(f"{own}ama/")}
            assert len(figures) >= 4
            for key, value in figures.items():
                assert by_step[entry["step"]][prefix + key.removeprefix(own)] == pytest.approx(value, rel=1e-6), key
    for entry in train:
        probabilities = [by_step[entry["step"]][f"train/ama/probability/{task}"] for task in SIZES]
        assert sum(probabilities) == pytest.approx(1, abs=1e-6)
    for entry in evaluations:
        assert by_step[entry["step"]]["eval/worst_excess"] == pytest.approx(entry["eval_worst_excess"], rel=1e-6)


# ---- One training ----


@pytest.fixture(scope="module")
def trained(_local_trackers, model_dir):
    """One training that reports to every tracker at once, with a token in its arguments."""
    args = AMAConfig(
        **QUICK | {"report_to": TRACKERS},
        output_dir=str(_local_trackers / "alone"),
        max_steps=4,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        run_name="alone",
        project="one-training",
        hub_token=SECRET,
    )
    trainer = new_trainer(model_dir, args, eval_dataset=make_dataset(SIZES, seed=1))
    trainer.train()
    if "wandb" in TRACKERS:
        import wandb

        wandb.finish()
    return trainer, _local_trackers


def test_tensorboard(trained):
    need("tensorboard")
    trainer, folder = trained
    (run,) = (folder / "alone" / "runs").iterdir()
    scalars = tensorboard_scalars(run)
    check_history(
        [{tag: value, "train/global_step": step} for tag, points in scalars.items() for step, value in points], trainer
    )
    assert {tag.split("/")[0] for tag in scalars} == {"train", "eval"}


def test_trackio(trained):
    need("trackio")
    runs = trackio_runs("one-training")
    assert list(runs) == ["alone"]
    check_history(runs["alone"], trained[0])


def test_wandb(trained):
    need("wandb")
    trainer, folder = trained
    check_history(wandb_runs(folder)["alone"]["history"], trainer)


def test_none(quick_args, model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = new_trainer(model_dir, quick_args())
    trainer.train()
    assert trainer.args.report_to == []
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


# ---- A pipeline ----


def run_tiny(folder: Path, model_dir: str, report_to: list[str], **settings) -> None:
    """Two specialists and one generalist of 3 steps each, in `folder`/out."""
    for task, size in SIZES.items():
        for split, seed in (("train", 0), ("test", 1)):
            path = folder / "data" / f"{task}_{split}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in make_rows(task, size, seed)))
    recipe = {
        **QUICK,
        "model_name_or_path": model_dir,
        "output_dir": str(folder / "out"),
        "tasks": [{"task": task, "path": "org/data", "eval_split": "test"} for task in SIZES],
        "tasks_dir": str(folder / "data"),
        "mixing": "ama_s",
        "max_steps": 3,
        "logging_steps": 1,
        "report_to": report_to,
        **settings,
    }
    write_json(folder / "recipe.yaml", recipe)
    parser = TrlParser((PipelineArguments, AMAConfig, ModelConfig, TaskMixtureConfig))
    parsed = parser.parse_args_and_config(["--config", str(folder / "recipe.yaml")])
    run_pipeline(*parsed, stages=("specialists", "losses", "train"))


@pytest.fixture(scope="module")
def pipeline(trained, model_dir):
    """A pipeline that reports to every tracker at once."""
    folder = trained[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "boards"))
        patch.setenv("WANDB_PROJECT", "pipeline")
        run_tiny(folder, model_dir, TRACKERS, run_name="trial", project="pipeline", hub_token=SECRET)
    return folder


def check_steps(logged: list[dict]) -> None:
    """The steps of the training begin at 1 and increase; an evaluation after it belongs to the last."""
    steps = [entry["train/global_step"] for entry in logged if "train/loss" in entry]
    assert steps == [1, 2, 3]
    assert all(entry["train/global_step"] in steps for entry in logged)


def test_pipeline_in_tensorboard(pipeline):
    need("tensorboard")
    assert {path.name for path in (pipeline / "boards").iterdir()} == {f"trial-{stage}" for stage in STAGES}
    for stage in STAGES:
        scalars = tensorboard_scalars(pipeline / "boards" / f"trial-{stage}")
        assert [step for step, _ in scalars["train/loss"]] == [1, 2, 3]
        assert ("train/ama/probability/list" in scalars) == stage.startswith("generalist")
        assert [step for step, _ in scalars.get("eval/loss", [])] == ([3] if stage.startswith("specialist") else [])


def test_pipeline_in_trackio(pipeline):
    need("trackio")
    import trackio

    runs = trackio_runs("pipeline")
    assert set(runs) == {f"trial-{stage}" for stage in STAGES}
    for name, logged in runs.items():
        check_steps(logged)
        assert any("eval/loss" in entry for entry in logged) == ("specialist" in name)
    assert trackio.context_vars.current_run.get() is None


def test_pipeline_in_wandb(pipeline):
    need("wandb")
    import wandb

    runs = {name: run for name, run in wandb_runs(pipeline).items() if run["project"] == "pipeline"}
    assert set(runs) == {f"trial-{stage}" for stage in STAGES}
    for name, run in runs.items():
        check_steps(run["history"])
        assert any("eval/loss" in entry for entry in run["history"]) == ("specialist" in name)
        assert run["group"] == "trial" and run["exit_code"] == 0
        assert run["kind"] == name.split("-")[1]
    assert wandb.run is None


def test_no_tracker_stores_a_token(pipeline):
    """Of the one training and the pipeline, which have it among their arguments; the rest of the files is not theirs."""
    files = [path for path in pipeline.rglob("*") if path.is_file() and path.name != "training_args.bin"]
    contents = {path: path.read_bytes() for path in files}
    for kind in {"tensorboard": "*tfevents*", "trackio": "*.db", "wandb": "*.wandb"}.items():
        if kind[0] in TRACKERS:  # so they can be searched: they name the run
            assert any(b"trial" in contents[path] for path in files if path.match(kind[1])), kind
    leaks = [path for path, content in contents.items() if SECRET.encode() in content and path.name != "recipe.yaml"]
    assert leaks == []


# ---- Runs that are open already, and names ----


def test_an_open_wandb_run_takes_all_stages_and_stays_open(pipeline, model_dir, tmp_path):
    need("wandb")
    import wandb

    with wandb.init(project="mine", name="by-hand") as run:
        with pytest.warns(UserWarning, match="every stage logs into it"):
            run_tiny(tmp_path, model_dir, ["wandb"])
        assert wandb.run is run
        run.log({"still_open": 1})
    logged = wandb_runs(pipeline)["by-hand"]["history"]
    assert [entry["train/global_step"] for entry in logged if "train/loss" in entry] == 3 * [1, 2, 3]
    assert logged[-1]["still_open"] == 1


def test_an_open_trackio_run_is_kept_apart_and_stays_open(pipeline, model_dir, tmp_path, monkeypatch):
    need("trackio")
    import trackio

    run = trackio.init(project="mine", name="by-hand")
    trackio.log({"before": 1})
    with monkeypatch.context() as patch:
        patch.setattr(run, "finish", lambda: pytest.fail("the user's run was finished"))
        run_tiny(tmp_path, model_dir, ["trackio"], project="theirs")
    assert trackio.context_vars.current_run.get() is run and trackio.config is run.config
    trackio.log({"still_open": 1})
    trackio.finish()
    logged = trackio_runs("mine")["by-hand"]
    assert [sorted(set(entry) - {"step", "timestamp"}) for entry in logged] == [["before"], ["still_open"]]
    names = trackio_runs("theirs")  # each with the time, as Trackio goes on with a run of the same name
    assert sorted(name.rsplit("-", 2)[0] for name in names) == sorted(f"out-{stage}" for stage in STAGES)


@pytest.mark.parametrize("ends", ["training", "evaluation"])
def test_a_failed_stage_leaves_no_run_open(pipeline, quick_args, model_dir, tmp_path, monkeypatch, ends):
    need("wandb")
    import wandb

    def begin(name):
        folder = tmp_path / f"fails-{ends}" / "specialists" / name
        trainer = new_trainer(model_dir, quick_args(report_to=TRACKERS, output_dir=str(folder), max_steps=1))
        return TrainingStage(folder, f"Specialist '{name}'", {}), trainer

    stage, trainer = begin("first")
    if ends == "training":
        monkeypatch.setattr(trainer, "save_state", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stage.train(trainer)
        assert wandb.run is None
    else:  # what comes between training and result is the caller's, so the next stage cleans up
        stage.train(trainer)
        assert wandb.run.name.startswith(f"fails-{ends}-specialist-first")
    stage, trainer = begin("second")
    stage.train(trainer)
    stage.finish({})
    assert wandb.run is None
    codes = {
        run["kind"] + name.split("specialist")[1].split("-")[1]: run["exit_code"]
        for name, run in wandb_runs(pipeline).items()
        if run["group"] == f"fails-{ends}"
    }
    assert codes == {"specialistfirst": 1, "specialistsecond": 0}


def test_names_without_a_tracker(quick_args, model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(DPOTrainer, "train", lambda *args, **kwargs: TrainOutput(0, 0.0, {}))
    for given, name in ((None, "lab-generalist-ama_s"), ("trial", "trial-generalist-ama_s")):
        folder = tmp_path / "lab" / "generalists" / "ama_s"
        trainer = new_trainer(model_dir, quick_args(output_dir=str(folder), run_name=given))
        TrainingStage(folder, "The generalist", {}).train(trainer)
        assert trainer.args.run_name == name
