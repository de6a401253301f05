"""Policies pulled from the Hub: the commit that was checked is the one that is used."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from huggingface_hub import HfApi, constants
from policy_worlds import adapter_fixture, evil_fixture, nothing_checked_fixture, trainers_fixture  # noqa: F401 - fixtures
from saved_adapters import WHO, edit, files_of, logits, refused, save_adapter
from tiny_models import lora, make_model
from tiny_pairs import make_dataset, make_rows
from tiny_runs import QUICK

from trl_ama import AMAConfig, AMAError, AMATrainer
from trl_ama.common.files import read_json
from trl_ama.policies import files as policy_files
from trl_ama.policies.checks import check_policy_source, split_revision
from trl_ama.policies.identity import model_identity
from trl_ama.policies.switching import trained_policy


SIZES = {"list": 8, "sort": 8}


@pytest.fixture
def pulled(hub, model_dir, tmp_path):
    """Two commits of an adapter on the Hub, and the same as folders."""
    folders = [save_adapter(tmp_path / f"local{seed}", model_dir, seed=seed) for seed in (1, 2)]
    commits = [hub.write("model", "org/adapter", files_of(folder)) for folder in folders]
    return commits, folders


def test_by_id_commit_branch_and_tag(hub, pulled, trainers, model_dir):
    """The right one of two commits is used, and the fingerprint names it."""
    (old, new), folders = pulled
    api = HfApi()
    api.create_tag("org/adapter", tag="v1", revision=old)
    api.create_branch("org/adapter", branch="next/2", revision=new)
    expected = {}
    for commit, folder in zip((old, new), folders, strict=True):
        with trained_policy(trainers[True], WHO, folder) as model:
            expected[commit] = logits(model)
    assert not torch.allclose(expected[old], expected[new])
    for revision, commit in (("", new), (f"@{old}", old), (f"@{new}", new), ("@v1", old), ("@next/2", new)):
        source = f"org/adapter{revision}"
        assert split_revision(source) == ("org/adapter", revision[1:] or None)
        assert check_policy_source(model_dir, WHO, source)
        assert model_identity(source) == f"org/adapter@{commit}"
        for peft in (True, False):
            with trained_policy(trainers[peft], WHO, source) as model:
                assert torch.equal(logits(model), expected[commit]) or not peft
                torch.testing.assert_close(logits(model), expected[commit])


def test_what_was_checked_is_what_is_used(hub, pulled, trainers, model_dir):
    """A branch that moves during a run does not change what is loaded, or named, until it is checked again."""
    (_, commit), folders = pulled
    with trained_policy(trainers[True], WHO, folders[1]) as model:
        expected = logits(model)
    assert check_policy_source(model_dir, WHO, "org/adapter")
    moved = hub.write("model", "org/adapter", files_of(folders[0]))
    assert model_identity("org/adapter") == f"org/adapter@{commit}"
    with trained_policy(trainers[True], WHO, "org/adapter") as model:
        torch.testing.assert_close(logits(model), expected)
    assert check_policy_source(model_dir, WHO, "org/adapter")
    assert model_identity("org/adapter") == f"org/adapter@{moved}"


def test_only_three_files_of_an_adapter_are_asked_for(hub, pulled, model_dir, evil, trainers):
    hub.write("model", "org/adapter", evil)
    hub.clear_log()
    assert check_policy_source(model_dir, WHO, "org/adapter")
    with trained_policy(trainers[True], WHO, "org/adapter"):
        pass
    got = {request.path.rsplit("/", 1)[-1] for request in hub.requests if "/resolve/" in request.path}
    assert got == {"adapter_config.json", "adapter_model.safetensors", "stage.json"}
    assert len([request for request in hub.requests if "/api/models/" in request.path]) == 1


def test_offline(hub, pulled, trainers, model_dir, tmp_path, tokenizer, monkeypatch):
    (_, commit), _ = pulled
    make_model(len(tokenizer), seed=3).save_pretrained(tmp_path / "full")
    full = hub.write("model", "org/full", files_of(tmp_path / "full"))
    hub.write("model", "org/unseen", {"adapter_config.json": b"{}"})
    for source, is_adapter in (("org/adapter", True), ("org/full", False)):
        assert check_policy_source(model_dir, WHO, source) is is_adapter
        with trained_policy(trainers[True], WHO, source):
            pass
    hub.clear_log()
    policy_files._checked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for source, is_adapter, oid in (("org/adapter", True, commit), ("org/full", False, full)):
        assert model_identity(source) == f"{source}@{oid}"
        assert check_policy_source(model_dir, WHO, source) is is_adapter
        with trained_policy(trainers[True], WHO, source):
            pass
    for unseen in ("org/unseen", "org/adapter@other", f"org/adapter@{'0' * 40}"):
        text = refused(model_dir, unseen)
        assert "is not on this machine, and the Hub cannot be reached" in text and "`hf download org/" in text
    assert hub.requests == []


@pytest.mark.parametrize("fault", ["500", "reset"])
def test_a_hub_in_trouble(hub, pulled, model_dir, fault):
    """What is in the cache is used; what is not is refused with a sentence."""
    (_, commit), _ = pulled
    assert check_policy_source(model_dir, WHO, "org/adapter")
    hub.fail(fault, times=100)
    policy_files._checked.clear()
    assert check_policy_source(model_dir, WHO, "org/adapter")
    assert model_identity("org/adapter") == f"org/adapter@{commit}"
    assert "the Hub cannot be reached" in refused(model_dir, "org/nothing")


def test_repositories_and_revisions_that_are_not_there(hub, pulled, model_dir):
    text = refused(model_dir, "org/nothing")
    assert "shows no such repository" in text and "HF_TOKEN" in text
    for revision in ("v9", "0" * 40):
        text = refused(model_dir, f"org/adapter@{revision}")
        assert f"'org/adapter' has no branch, tag or commit '{revision}'" in text
    with pytest.raises(AMAError, match="The model 'org/adapter' .*no branch, tag or commit 'v9'"):
        model_identity("org/adapter", "v9")
    with pytest.raises(AMAError, match="shows no such repository"):
        model_identity("org/nothing")
    for name in ("./nowhere", "/no/where", "a b"):
        assert "there is no such folder, and it cannot be a Hub id" in refused(model_dir, name)
    hub.write("model", "org/empty", {"README.md": b"nothing"})
    assert "neither an adapter (no adapter_config.json) nor a model" in refused(model_dir, "org/empty")


def test_private_repositories(hub, pulled, model_dir, adapter, monkeypatch):
    hub.create("model", "org/secret", private=True)
    commit = hub.write("model", "org/secret", files_of(adapter))
    for token in (None, hub.OTHER_TOKEN, "hf_wrong"):
        monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
        for source in ("org/secret", f"org/secret@{commit}"):
            text = refused(model_dir, source)
            assert "token" in text and "hf auth" in text and (token is None or token not in text)
    monkeypatch.setenv("HF_TOKEN", hub.READ_TOKEN)
    assert check_policy_source(model_dir, WHO, "org/secret")
    assert model_identity("org/secret") == f"org/secret@{commit}"


def test_a_pickle_on_the_hub(hub, model_dir, adapter, evil, trainers):
    Path(adapter, "adapter_model.safetensors").unlink()
    hub.write("model", "org/pickle", {**files_of(adapter), **evil})
    text = refused(model_dir, "org/pickle")
    assert "adapter_model.bin only, which is a pickle" in text
    with pytest.raises(AMAError, match="pickle"), trained_policy(trainers[True], WHO, "org/pickle"):
        pass
    assert not [request for request in hub.requests if request.path.endswith(".bin") and request.method == "GET"]


def test_a_model_with_code_on_the_hub(hub, model_dir, tmp_path, tokenizer, evil, trainers):
    make_model(len(tokenizer), seed=3).save_pretrained(tmp_path / "full")
    files = files_of(tmp_path / "full")
    config = json.loads(files["config.json"])
    auto_map = json.loads(evil["config.json"])["auto_map"]
    hub.write("model", "org/full", {**evil, **files})
    assert not check_policy_source(model_dir, WHO, "org/full")
    with trained_policy(trainers[True], WHO, "org/full") as model:
        plain = logits(model)
    hub.write("model", "org/full", {"config.json": json.dumps({**config, "auto_map": auto_map})})
    assert "`auto_map` in its config.json" in refused(model_dir, "org/full")
    with trained_policy(trainers[True], WHO, f"org/full@{hub.commits('model', 'org/full')[1].oid}") as model:
        assert torch.equal(logits(model), plain)


def test_revisions_of_the_base_model(hub, model_dir, adapter):
    old = hub.write("model", "org/base", files_of(model_dir))
    new = hub.write("model", "org/base", {"README.md": b"new"})
    HfApi().create_tag("org/base", tag="v1", revision=old)
    edit(adapter, base_model_name_or_path="org/base", revision=old)
    for revision in (old, "v1"):
        assert check_policy_source("org/base", WHO, adapter, base_revision=revision)
    for revision in (None, "main", new):
        text = refused("org/base", adapter, base_revision=revision)
        assert f"trained on revision '{old}' of 'org/base'" in text and f"'{revision or 'main'}' ({new})" in text
        assert f"Set model_revision to '{old}'" in text
    edit(adapter, revision="v1")
    assert check_policy_source("org/base", WHO, adapter, base_revision=old)
    assert f"revision 'v1' ({old})" in refused("org/base", adapter)
    for unknown in ("gone", None):  # nothing to compare
        edit(adapter, revision=unknown)
        assert check_policy_source("org/base", WHO, adapter)


def test_the_trainer_with_specialists_of_the_hub(hub, pulled, model_dir, quick_args):
    """Their log-probs are those of the same adapters from folders, number for number."""
    (old, _), folders = pulled

    def columns(first, second):
        trainer = AMATrainer(
            model_dir,
            args=quick_args(max_steps=2),
            train_dataset=make_dataset(SIZES),
            peft_config=lora(),
            specialists={"list": first, "sort": second},
        )
        trainer.train()
        return {name: trainer.train_dataset[name] for name in trainer.train_dataset.column_names if "logps" in name}

    ours, theirs = columns(f"org/adapter@{old}", "org/adapter"), columns(*folders)
    assert set(ours) == {f"{who}_{side}_logps" for who in ("ref", "specialist") for side in ("chosen", "rejected")}
    for name, values in theirs.items():
        np.testing.assert_array_equal(ours[name], values)
    assert not np.allclose(ours["specialist_chosen_logps"], ours["ref_chosen_logps"])


def test_the_pipeline_with_specialists_of_the_hub(hub, pulled, model_dir, tmp_path):
    from trl import ModelConfig, TrlParser

    from trl_ama import TaskMixtureConfig, run_pipeline
    from trl_ama.recipe.arguments import PipelineArguments

    (old, new), folders = pulled
    for task in SIZES:
        rows = "".join(json.dumps(row) + "\n" for row in make_rows(task, 12, 0))
        (tmp_path / f"{task}.jsonl").write_text(rows)

    def losses(output_dir, *specialists):
        recipe = {
            **QUICK,
            "model_name_or_path": model_dir,
            "output_dir": str(output_dir),
            "use_peft": True,
            "lora_r": 4,
            "lora_target_modules": "all-linear",
            "tasks": [
                {"task": task, "path": "json", "data_files": str(tmp_path / f"{task}.jsonl"), "specialist": specialist}
                for task, specialist in zip(SIZES, specialists, strict=True)
            ],
        }
        path = tmp_path / "config.yaml"
        path.write_text(json.dumps(recipe))
        parser = TrlParser((PipelineArguments, AMAConfig, ModelConfig, TaskMixtureConfig))
        run_pipeline(*parser.parse_args_and_config(["--config", str(path)]), stages=("losses",))
        parts = [output_dir / "reference_losses" / task / "train.parquet" for task in SIZES]
        return concatenate_datasets([Dataset.from_parquet(str(part)) for part in parts])

    ours = losses(tmp_path / "hub", "org/adapter", f"org/adapter@{old}")
    theirs = losses(tmp_path / "local", folders[1], folders[0])
    for name in ("specialist_chosen_logps", "specialist_rejected_logps"):
        np.testing.assert_array_equal(ours[name], theirs[name])
    for task, commit in zip(SIZES, (new, old), strict=True):
        note = read_json(tmp_path / "hub" / "reference_losses" / task / "fingerprint.json")
        assert note["fingerprint"]["specialist"] == f"org/adapter@{commit}"
    moved = hub.write("model", "org/adapter", files_of(folders[0]))
    with pytest.raises(AMAError, match=f"specialist='org/adapter@{new}', but this run has .*@{moved}"):
        losses(tmp_path / "hub", "org/adapter", f"org/adapter@{old}")
