"""State files carry a version: an older one is read, a newer one is refused by name, with both versions and what to do."""

import json
import re

import numpy as np
import pytest
from test_pipeline import copy, data_dir, finished, no_training, recipe  # noqa: F401

from trl_ama import AMAError, run_pipeline
from trl_ama.fingerprint import read_json, write_json
from trl_ama.html_report import collect
from trl_ama.loss_dataset import read_note
from trl_ama.loss_shards import LossShards
from trl_ama.mixing import build_strategy
from trl_ama.mixture import Mixture
from trl_ama.training_stage import TrainingStage
from trl_ama.versions import VERSIONS


def with_version(path, version):
    """Rewrites a file as of another version; of none for `None`."""
    content = read_json(path)
    content.pop("version")
    write_json(path, content if version is None else {"version": version, **content})


def refused(name, version=99):
    return rf"{re.escape(name)}' is of version {version}, this trl-ama reads version {VERSIONS[name]}\. Update trl-ama, or "


def test_every_file_of_a_run_has_its_version(finished):  # noqa: F811
    folder = finished[0]
    paths = [path for name in VERSIONS for path in folder.rglob(name) if name != "trainer_state.json"]
    assert {path.name for path in paths} == {"stage.json", "results.json", "run.json", "fingerprint.json"}
    assert all(read_json(path)["version"] == VERSIONS[path.name] for path in paths)
    state = max(folder.glob("generalists/ama_s/checkpoint-*/trainer_state.json"))
    assert read_json(state)["stateful_callbacks"]["ama"]["version"] == VERSIONS["trainer_state.json"]


@pytest.mark.parametrize("name", ["specialists/list/stage.json", "generalists/ama_s/stage.json", "results.json"])
def test_a_runs_files(copy, recipe, no_training, finished, name):  # noqa: F811
    path = copy / name
    with_version(path, 99)
    with pytest.raises(AMAError, match=refused(path.name)) as caught:
        run_pipeline(*recipe(copy))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with_version(path, None)  # as the first releases wrote it
    assert run_pipeline(*recipe(copy))["policies"] == finished[1]["policies"]


def test_notes_of_reference_losses(copy):  # noqa: F811
    folder = copy / "reference_losses" / "list"
    with_version(folder / "fingerprint.json", 99)
    with pytest.raises(
        AMAError, match=r"version 99 \('fingerprint.json'\), this trl-ama reads version 2\. Update trl-ama"
    ):
        read_note(folder)
    with_version(folder / "fingerprint.json", 1)  # without the files' hashes
    with pytest.raises(AMAError, match=r"version 1 .* reads version 2\. Use the trl-ama that made them"):
        read_note(folder)


def test_shards(tmp_path):
    def save(folder):
        with LossShards(folder, {"seed": 1}, ["a", "b"]) as shards:
            shards.add(np.array([0]), {"x": np.zeros(2, dtype=np.float32)})

    save(tmp_path / "new")
    with_version(tmp_path / "new" / "run.json", 99)
    with pytest.raises(AMAError, match=refused("run.json") + "delete that folder, and its pairs are scored again"):
        LossShards(tmp_path / "new", {"seed": 1}, ["a", "b"])
    write_json(tmp_path / "old" / "run.json", {"fingerprint": {"seed": 1}})
    save(tmp_path / "old")
    scores = {"x": np.ones(2, dtype=np.float32)}
    assert LossShards(tmp_path / "old", {"seed": 1}, ["a", "b"]).load(scores).tolist() == [True, False]


def test_the_mixing_state():
    def mixture():
        made = Mixture(build_strategy("ama_s", [1, 1], mixing_lr=1.0), ["list", "sort"], 0.7)
        made.begin(10)
        return made

    state = json.loads(json.dumps(mixture().state_dict()))
    mixture().resume(10, state, skips_data=True)
    with pytest.raises(AMAError, match=refused("trainer_state.json") + "resume with the trl-ama that wrote it"):
        mixture().resume(10, {**state, "version": 99}, skips_data=True)
    with pytest.raises(AMAError, match=r"task_names=\['list', 'sorts'\], this run has task_names=\['list', 'sort'\]"):
        mixture().resume(10, {**state, "task_names": ["list", "sorts"]}, skips_data=True)


@pytest.mark.parametrize("content", [[], 5, {"version": "x"}, {"version": True}, {"version": -1}])
def test_versions_that_are_none(tmp_path, content):
    write_json(tmp_path / "stage.json", content)
    with pytest.raises(AMAError, match=r"stage.json' is (damaged|of version).*delete .* and train it again"):
        TrainingStage(tmp_path, "The stage", {}).check()


def test_a_page_leaves_out_what_is_newer(copy):  # noqa: F811
    with_version(copy / "results.json", 99)
    data = collect(copy)
    assert data["results"] is None
    assert any(
        "results.json is of version 99, newer than this trl-ama, and was left out" in text for text in data["missing"]
    )
