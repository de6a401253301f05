"""Pairs about images through all stages; TRL's own trainer on the same raw rows says what is right."""

import json
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hub_world import parse
from tiny_runs import QUICK, RECIPE
from trl import DPOConfig, DPOTrainer
from vision_model import make_vision_rows, processor_fixture, trl_logps, vision_dir_fixture  # noqa: F401 - fixtures

from trl_ama import AMAError, join_reference_losses, run_pipeline
from trl_ama.common.files import write_json
from trl_ama.pipeline.losses import compute_reference_losses
from trl_ama.recipe.settings import RunSettings
from trl_ama.reference_losses.checks import sha256
from trl_ama.reference_losses.columns import LOGP_COLUMNS
from trl_ama.reference_losses.loading import load_reference_losses
from trl_ama.tasks.forms import pair_id_of
from trl_ama.tasks.images import images_of


SIZES = {"name": 9, "end": 7}
# Two forms of the same: a list of images that the prompt has a place for, and one image with a prompt of plain text
FORMS = {"name": {"parts": True, "column": "images"}, "end": {"parts": False, "column": "image"}}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for task, count in SIZES.items():
        for split, size, seed in (("train", count, 0), ("test", 4, 1)):
            rows = make_vision_rows(task, size, seed, **FORMS[task])
            Dataset.from_list(rows).to_parquet(str(folder / f"{task}_{split}.parquet"))
    return folder


@pytest.fixture(scope="module")
def recipe(vision_dir, data_dir, tmp_path_factory):
    """Builds the four parsed argument groups, as the command line does."""
    path = tmp_path_factory.mktemp("recipe") / "config.yaml"
    write_json(
        path,
        {
            **RECIPE,
            "model_name_or_path": vision_dir,
            "tasks": [{"task": task, "path": "org/data", "eval_split": "test"} for task in SIZES],
            "tasks_dir": str(data_dir),
            "specialist_args": {"max_steps": 4},
            "lora_target_modules": ["q_proj", "v_proj"],
            "per_device_eval_batch_size": 3,
            "max_steps": 3,
        },
    )

    def build(output_dir, *flags):
        return parse(path, "--output_dir", output_dir, *flags)

    return build


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, run_pipeline(*recipe(folder))


def raw_rows(split: str = "train") -> dict[str, list[dict]]:
    count, seed = (None, 0) if split == "train" else (4, 1)
    return {task: make_vision_rows(task, count or size, seed, **FORMS[task]) for task, size in SIZES.items()}


def as_dataset(rows: list[dict], task: str) -> Dataset:
    return Dataset.from_list([{**row, "task": task} for row in rows])


def test_reference_losses_are_trls(finished, vision_dir, tmp_path):
    from peft import PeftModel
    from transformers import LlavaForConditionalGeneration

    folder, _ = finished
    losses = load_reference_losses(folder / "reference_losses")
    for task, rows in raw_rows().items():
        plain = DPOTrainer(
            model=vision_dir, args=DPOConfig(**QUICK, output_dir=str(tmp_path)), train_dataset=Dataset.from_list(rows)
        )
        policy = LlavaForConditionalGeneration.from_pretrained(vision_dir)
        policy = PeftModel.from_pretrained(policy, str(folder / "specialists" / task))
        expected = np.concatenate([trl_logps(plain, model, rows) for model in (plain.ref_model, policy)], axis=1)
        joined = join_reference_losses(as_dataset(rows, task), losses["train"])
        found = np.stack([np.array(joined[column]) for column in LOGP_COLUMNS], axis=1)
        np.testing.assert_allclose(found, expected, rtol=2e-5)
        assert np.abs(expected[:, :2] - expected[:, 2:]).max() > 0.1  # the specialist has learned


def test_another_image_is_another_pair(finished):
    losses = load_reference_losses(finished[0] / "reference_losses")
    rows = raw_rows()["name"]
    rows[0]["images"], rows[1]["images"] = rows[1]["images"], rows[0]["images"]
    with pytest.raises(AMAError, match="lack 2 of the 9 pairs of task 'name'"):
        join_reference_losses(as_dataset(rows, "name"), losses["train"])


def test_images_are_published_with_the_texts(finished):
    losses = load_reference_losses(finished[0] / "reference_losses")
    by_id = {row["pair_id"]: row for row in losses["train"]}
    assert len(by_id) == sum(SIZES.values())
    for task, rows in raw_rows().items():
        for row in rows:
            kept = by_id[pair_id_of(row)]
            assert np.array_equal(np.array(kept["images"][0]), np.array(images_of(row)[0]))
            assert (kept["prompt"], kept["chosen"], kept["task"]) == (row["prompt"], row["chosen"], task)


def test_generalist_and_evaluation(finished):
    folder, results = finished
    report = json.loads((folder / "results.json").read_text())
    by_task = report["policies"]["ama_s"]["by_task"]
    assert set(by_task) == set(SIZES)
    assert all(np.isfinite(list(figures.values())).all() for figures in by_task.values())
    assert by_task["name"]["pairs"] == 4
    base = report["policies"]["base"]["by_task"]
    assert by_task["name"]["loss"] != base["name"]["loss"]


def test_second_run_finds_all_done(finished, recipe, capsys):
    folder, results = finished
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*/*.safetensors")}
    assert len(before) == 3
    run_pipeline(*recipe(folder))
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("*/*/*.safetensors")}


def test_ready_losses_bring_their_images(finished, recipe, tmp_path):
    folder, _ = finished
    tasks = [json.dumps({"task": task}) for task in SIZES]
    arguments = recipe(tmp_path / "run", "--reference_losses", folder / "reference_losses", "--tasks", *tasks)
    arguments[-1].tasks_dir = None
    results = run_pipeline(*arguments)
    assert not (tmp_path / "run" / "specialists").exists()
    ours, theirs = (results, json.loads((folder / "results.json").read_text()))
    theirs = theirs["policies"]["ama_s"]["by_task"]["end"]["loss"]
    assert ours["policies"]["ama_s"]["by_task"]["end"]["loss"] == pytest.approx(theirs, rel=1e-6)


def test_images_can_be_left_out(finished, recipe, tmp_path):
    arguments = recipe(tmp_path / "run", "--include_text", "False")
    arguments[1].specialists = {task: str(finished[0] / "specialists" / task) for task in SIZES}
    compute_reference_losses(RunSettings(*arguments))
    losses = load_reference_losses(tmp_path / "run" / "reference_losses")
    assert not {"images", "image", "prompt", "chosen"} & set(losses["train"].column_names)
    joined = join_reference_losses(as_dataset(raw_rows()["name"], "name"), losses["train"])
    with_images = load_reference_losses(finished[0] / "reference_losses")
    expected = join_reference_losses(as_dataset(raw_rows()["name"], "name"), with_images["train"])
    assert joined["specialist_chosen_logps"][:] == expected["specialist_chosen_logps"][:]


def test_cards_load_the_model_as_it_is(finished):
    folder = finished[0] / "generalists" / "ama_s"
    code = re.search(r"```python\n(.*?AutoProcessor.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)[1]
    found = {}
    exec(code.replace("path/to/this/folder", str(folder)), found)
    assert type(found["model"]).__name__ == "LlavaForConditionalGeneration"
    assert any("lora_B" in name and weight.abs().max() > 0 for name, weight in found["model"].named_parameters())
    assert type(found["processor"]).__name__ == "LlavaProcessor"


def test_losses_that_name_files_are_refused(finished, tmp_path):
    """A stranger's row must not open a file of this machine."""
    folder = tmp_path / "reference_losses"
    shutil.copytree(finished[0] / "reference_losses", folder)
    path, secret = folder / "name" / "train.parquet", tmp_path / "secret.png"
    table = pq.read_table(path)
    images = table["images"].to_pylist()
    secret.write_bytes(images[0][0]["bytes"])
    images[0] = [{"bytes": None, "path": str(secret)}]
    number = table.column_names.index("images")
    pq.write_table(table.set_column(number, "images", pa.array(images, table["images"].type)), path)
    note = json.loads((folder / "name" / "fingerprint.json").read_text())
    note["files"]["train.parquet"]["sha256"] = sha256(path)
    write_json(folder / "name" / "fingerprint.json", note)
    with pytest.raises(AMAError, match="Row 0 has an image that is not in the row itself"):
        load_reference_losses(folder)
