"""Where models are loaded: specialists beside the base, and nothing is moved that was spread over several devices."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from policy_worlds import trainers_fixture  # noqa: F401 - a fixture
from saved_adapters import WHO, save_adapter
from tiny_models import make_model
from tiny_pairs import make_dataset
from tiny_runs import QUICK

from trl_ama import AMAConfig, AMAError
from trl_ama.dpo.pair_trainer import ScoringTrainer
from trl_ama.dpo.scoring import score_pairs
from trl_ama.policies import switching
from trl_ama.policies.placement import device_map_like, spread
from trl_ama.policies.switching import trained_policy


SECOND = torch.device("cuda", 1)
ON_DISK = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


@pytest.mark.parametrize(
    "device_map, places",
    [
        (None, []),
        ({"": 1}, []),
        ({"": "cuda:1"}, []),
        ({"": SECOND}, []),
        ({"": "cpu"}, []),  # which the Trainer moves
        ({"": 0}, ["cuda:0"]),
        ({"a": 0, "b": 1}, ["cuda:0", "cuda:1"]),
        ({"a": "cpu", "b": 1}, ["cuda:1", "cpu"]),
    ],
)
def test_what_is_spread(device_map, places):
    model = SimpleNamespace(hf_device_map=device_map) if device_map else SimpleNamespace()
    assert spread(model, SECOND) == places
    assert device_map_like(model, SECOND) == (device_map if places else {"": SECOND})


def test_nothing_is_said_of_a_device_where_there_is_one():
    assert device_map_like(SimpleNamespace(), torch.device("cpu")) is None


@pytest.mark.parametrize("of_base", [None, {"model": 0, "lm_head": 1}])
def test_a_full_specialist_is_loaded_where_the_base_is(trainers, tmp_path, tokenizer, monkeypatch, of_base):
    """Without a map, TRL would spread it over all GPUs that a process sees, and each of several processes sees all."""
    make_model(len(tokenizer), seed=5).save_pretrained(tmp_path / "full")
    trainer, asked = trainers[False], {}
    load = switching.create_model_from_path

    def loaded(*args, **kwargs):
        asked.update(kwargs)
        model = load(*args, **{**kwargs, "device_map": None})
        moved = []
        monkeypatch.setattr(model, "to", lambda device: moved.append(device) or model)
        model.hf_device_map, model.moved = kwargs["device_map"], moved
        return model

    monkeypatch.setattr(switching, "create_model_from_path", loaded)
    monkeypatch.setattr(trainer, "accelerator", SimpleNamespace(device=SECOND))
    if of_base is not None:
        monkeypatch.setattr(trainer.model, "hf_device_map", of_base, raising=False)
    with trained_policy(trainer, WHO, str(tmp_path / "full")) as model:
        assert asked["device_map"] == (of_base or {"": SECOND})
        assert model.moved == ([] if of_base else [SECOND])


@pytest.mark.filterwarnings("ignore")
def test_a_full_specialist_beside_a_base_in_several_places(model_dir, tokenizer, tmp_path, caplog):
    """A layer on the disk stands for one on another GPU: the same hooks of accelerate carry what is computed."""
    make_model(len(tokenizer), seed=5).save_pretrained(tmp_path / "full")
    scores = []
    for kwargs in ({}, {"device_map": ON_DISK, "offload_folder": str(tmp_path / "off")}):
        args = AMAConfig(str(tmp_path / "out"), model_init_kwargs=kwargs, **QUICK)
        trainer = ScoringTrainer(model_dir, args=args, train_dataset=make_dataset({"list": 4}))
        with trained_policy(trainer, WHO, str(tmp_path / "full")) as model:
            places = {parameter.device.type for parameter in model.parameters()}
            scores.append(score_pairs(trainer, model, trainer.train_dataset, ""))
    assert places == {"cpu", "meta"} and "The model is spread over cpu, disk" in caplog.text
    np.testing.assert_array_equal(scores[0]["chosen_logps"], scores[1]["chosen_logps"])
    folder = save_adapter(tmp_path / "a", model_dir)
    with pytest.raises(AMAError, match=r"does not fit onto the GPU.*cpu, disk.*load_in_4bit"):
        with trained_policy(trainer, WHO, folder):
            pass


def test_an_adapter_moves_no_base_that_is_spread(trainers, model_dir, tmp_path, monkeypatch):
    folder, trainer = save_adapter(tmp_path / "a", model_dir), trainers[True]
    with trained_policy(trainer, WHO, folder) as model:
        expected = score_pairs(trainer, model, trainer.train_dataset, "")
    base = trainer.model.get_base_model()
    monkeypatch.setattr(base, "hf_device_map", {"model": 0, "lm_head": 1}, raising=False)
    monkeypatch.setattr(type(base), "to", lambda *args: pytest.fail("it was moved"))
    monkeypatch.setattr(type(trainer.model), "to", lambda *args: pytest.fail("it was moved"))
    with trained_policy(trainer, WHO, folder) as model:
        scores = score_pairs(trainer, model, trainer.train_dataset, "")
    np.testing.assert_array_equal(scores["chosen_logps"], expected["chosen_logps"])
