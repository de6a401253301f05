"""Which base an adapter belongs to: the hash of its weights decides before any name."""

import os
import shutil

import pytest
import torch
from saved_adapters import WHO, files_of, merge_refused, refused, save_adapter
from tiny_models import make_model, save
from transformers import AutoModelForCausalLM

from trl_ama import AMAError
from trl_ama.common.files import read_json, write_json
from trl_ama.policies import files as policy_files
from trl_ama.policies.checks import check_policy_source
from trl_ama.policies.identity import model_identity, weights_identity


@pytest.fixture(autouse=True)
def nothing_checked(monkeypatch):
    monkeypatch.setattr(policy_files, "_checked", {})


def make_base(folder, tokenizer, seed=0):
    return save(make_model(len(tokenizer), seed=seed), tokenizer, folder)


def trained_by_the_pipeline(folder, base, noted=None):
    """An adapter with the part of the pipeline's note that says what it was trained on."""
    source = save_adapter(folder, base)
    write_json(folder / "stage.json", {"fingerprint": {"base_model": noted or model_identity(base)}, "result": {}})
    return source


OTHER = r"was trained on other weights than '.*' holds \(its stage.json has their hash\)"


def test_a_base_that_was_trained_again_in_its_place(tmp_path, tokenizer):
    base = make_base(tmp_path / "base", tokenizer)
    source = trained_by_the_pipeline(tmp_path / "adapter", base)
    assert check_policy_source(base, WHO, source)
    before = model_identity(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    model.save_pretrained(base)
    assert model_identity(base) != before
    with pytest.raises(AMAError, match=OTHER):
        check_policy_source(base, WHO, source)
    merge_refused(source, tmp_path / "merged", OTHER)
    shutil.rmtree(base)
    make_base(tmp_path / "base", tokenizer)
    assert model_identity(base) == before and check_policy_source(base, WHO, source)


def test_the_same_relative_name_in_another_project(tmp_path, tokenizer, monkeypatch):
    for project, seed in (("one", 0), ("two", 1)):
        make_base(tmp_path / project / "outputs" / "sft", tokenizer, seed)
    monkeypatch.chdir(tmp_path / "one")
    trained_by_the_pipeline(tmp_path / "adapter", os.path.join("outputs", "sft"))
    config = read_json(tmp_path / "adapter" / "adapter_config.json")
    assert config["base_model_name_or_path"] == os.path.join("outputs", "sft")
    source = str(tmp_path / "adapter")
    assert check_policy_source(os.path.join("outputs", "sft"), WHO, source)
    monkeypatch.chdir(tmp_path / "two")
    with pytest.raises(AMAError, match=OTHER):
        check_policy_source(os.path.join("outputs", "sft"), WHO, source)
    merge_refused(source, tmp_path / "merged", OTHER)
    # The same weights are the same base, whatever they are called by now
    assert check_policy_source(str(tmp_path / "one" / "outputs" / "sft"), WHO, source)
    shutil.copytree(tmp_path / "one" / "outputs" / "sft", tmp_path / "copy")
    assert check_policy_source(str(tmp_path / "copy"), WHO, source)


def test_without_a_hash_there_are_only_names(tmp_path, tokenizer):
    """Adapters of others: the same name is the same base, another one is another."""
    base, copied = make_base(tmp_path / "base", tokenizer), make_base(tmp_path / "other", tokenizer)
    source = save_adapter(tmp_path / "adapter", base)
    assert check_policy_source(base, WHO, source)
    assert f"is an adapter of '{base}', but this run's base model is '{copied}'" in refused(copied, source)
    for note in ({"fingerprint": None}, {"fingerprint": {"base_model": 3}}, {}):
        write_json(tmp_path / "adapter" / "stage.json", note)
        assert check_policy_source(base, WHO, source)


def test_a_repository_and_a_folder_of_the_same_weights(hub, tmp_path, tokenizer):
    """Trained on a commit of the Hub, used on a copy of it, and the other way round; another commit's weights are others."""
    local, other = make_base(tmp_path / "local", tokenizer), make_base(tmp_path / "other", tokenizer, seed=1)
    commit = hub.write("model", "org/base", files_of(local))
    pinned = {"revision": commit}
    AutoModelForCausalLM.from_pretrained("org/base", **pinned)  # whoever trained on it has it in the cache
    assert weights_identity("org/base", commit) == weights_identity(local, None) != weights_identity(other, None)
    source = trained_by_the_pipeline(tmp_path / "a", local, noted=f"org/base@{commit}")
    assert check_policy_source(local, WHO, source)
    shutil.copytree(local, tmp_path / "renamed")
    assert check_policy_source(str(tmp_path / "renamed"), WHO, source)
    shutil.rmtree(local)
    shutil.copytree(other, local)
    with pytest.raises(AMAError, match=OTHER):
        check_policy_source(local, WHO, source)
    source = trained_by_the_pipeline(tmp_path / "b", other)
    hub.write("model", "alice/adapter", files_of(source))
    assert check_policy_source(other, WHO, "alice/adapter")
    with pytest.raises(AMAError, match="is an adapter of"):
        check_policy_source(str(tmp_path / "renamed"), WHO, "alice/adapter")
    assert "is an adapter of" in refused("org/base", source, base_revision=commit)


def test_what_is_not_in_the_cache_has_no_hash(hub, tmp_path, tokenizer):
    commit = hub.write("model", "org/base", files_of(make_base(tmp_path / "local", tokenizer)))
    assert weights_identity("org/base", commit) is None
    assert weights_identity("", "nothing") is None
