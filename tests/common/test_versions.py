"""State files carry a version: an older one is read, a newer one is refused by name, with both versions and what to do.

The files of a whole run are in tests/pipeline/test_run.py.
"""

import json

import numpy as np
import pytest
from state_versions import refused, with_version

from trl_ama import AMAError
from trl_ama.common.files import write_json
from trl_ama.mixing import build_strategy
from trl_ama.reference_losses.shards import LossShards
from trl_ama.sampling.mixture import Mixture
from trl_ama.training.stage import TrainingStage


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
