"""What others published, used again: nothing is trained or scored twice, and the numbers are the same."""

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_dataset
from hub_world import HELD_OUT, SIZES, parse, upload_model, upload_pairs, write_recipe
from huggingface_hub import DatasetCard, ModelCard
from peft import AutoPeftModelForCausalLM, LoraConfig
from surroundings import forget_downloads, logged_in
from tiny_models import make_model, save
from tiny_pairs import make_dataset
from transformers import LlamaModel, Trainer, set_seed
from trl import DPOTrainer

from trl_ama import (
    AMAConfig,
    AMAError,
    AMATrainer,
    join_reference_losses,
    load_reference_losses,
    run_pipeline,
)
from trl_ama.common.files import read_json
from trl_ama.fast_path import choice as prefix_support
from trl_ama.fast_path import trial as prefix_trial
from trl_ama.scripts import ama, ama_losses, ama_specialists


LOSSES = "org/mine-reference-losses"
CPU = ("--use_cpu", "true", "--disable_tqdm", "true", "--report_to", "none", "--use_peft", "true")


@pytest.fixture
def counts(monkeypatch):
    """How often the model runs, and what is trained; the trial and proof of the fast path are left out."""
    counted: dict = {"training": 0, "scoring": 0, "optimizer_steps": []}
    forward, train = LlamaModel.forward, Trainer.train

    def counted_forward(self, *args, **kwargs):
        counted["training" if torch.is_grad_enabled() else "scoring"] += 1
        return forward(self, *args, **kwargs)

    def counted_train(self, *args, **kwargs):
        result = train(self, *args, **kwargs)
        counted["optimizer_steps"].append(self.state.global_step)
        return result

    def uncounted(check):
        def checked(*args):
            before = dict(counted)
            try:
                return check(*args)
            finally:
                counted.update(before)

        return checked

    monkeypatch.setattr(LlamaModel, "forward", counted_forward)
    monkeypatch.setattr(Trainer, "train", counted_train)
    monkeypatch.setattr(prefix_trial, "_trial", uncounted(prefix_trial._trial))
    monkeypatch.setattr(prefix_support, "prove", uncounted(prefix_support.prove))
    return counted


def losses_of(run: Path) -> list[float]:
    history = read_json(run / "generalists/ama_s/trainer_state.json")["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_the_relay(hub, model_dir, tmp_path, monkeypatch, counts):
    upload_model(hub, model_dir)
    for task, count in SIZES.items():
        upload_pairs(hub, task, count)
    homes = tmp_path / "first", tmp_path / "second"
    for home in homes:
        home.mkdir()

    def command(home, script, *flags):
        """As in a process of its own: from its folder, with the random numbers that a process starts with."""
        monkeypatch.chdir(home)
        set_seed(0)
        script.main(*parse("config.yaml", *flags))

    push = {"push_to_hub": True, "hub_model_id": "org/mine", "output_dir": "run"}
    write_recipe(homes[0] / "config.yaml", **push)
    command(homes[0], ama_specialists)
    command(homes[0], ama_losses)
    command(homes[0], ama, "--push_to_hub", "false")

    # The second home has the recipe's hyper-parameters and Hub ids; no data, no specialists, and nothing in its cache
    write_recipe(
        homes[1] / "config.yaml",
        without=("tasks", "specialist_args"),
        **{**push, "hub_model_id": "alice/generalist"},
        reference_losses=LOSSES,
    )
    forget_downloads()
    before = len(hub.requests)
    counts.update(training=0, scoring=0, optimizer_steps=[])
    command(homes[1], ama)

    steps = 4
    assert counts["optimizer_steps"] == [steps]  # one training: the generalist's
    assert counts["training"] == steps
    # Held-out pairs under the generalist, in batches of at least 16: no pass of a reference or specialist
    assert 1 <= counts["scoring"] <= -(-HELD_OUT * len(SIZES) // 16)
    assert losses_of(homes[1] / "run") == pytest.approx(losses_of(homes[0] / "run"), rel=1e-6)
    assert not (homes[1] / "run" / "specialists").exists()
    pulled = {request.path.split("/resolve/")[0] for request in hub.requests[before:] if "/resolve/" in request.path}
    assert pulled <= {"/org/base", f"/datasets/{LOSSES}"}
    model = AutoPeftModelForCausalLM.from_pretrained("alice/generalist")
    assert "default" in model.peft_config
    ours = read_json(homes[0] / "run/results.json")["policies"]
    theirs = read_json(homes[1] / "run/results.json")["policies"]
    for policy in ("base", "specialists", "ama_s"):
        for task in SIZES:
            assert theirs[policy]["by_task"][task] == pytest.approx(ours[policy]["by_task"][task], rel=1e-5, abs=1e-6)


@pytest.fixture(scope="module")
def published(model_dir, tmp_path_factory):
    """A run's folder, made once, and the Hub's repositories when it had published its reference losses."""
    folder = tmp_path_factory.mktemp("published")
    with logged_in() as hub:
        upload_model(hub, model_dir)
        for task, count in SIZES.items():
            upload_pairs(hub, task, count)
        recipe = write_recipe(folder / "publish.yaml")
        run_pipeline(*parse(recipe, "--output_dir", folder / "first"), stages=("specialists", "losses"))
        load_reference_losses(folder / "first/reference_losses").push_to_hub(LOSSES)
        return folder / "first", hub.repos


@pytest.fixture
def losses_on_hub(hub, published, tmp_path):
    """Reference losses of both tasks on the Hub, made here in process. Returns the Hub and the folder they came from."""
    folder, repositories = published
    hub.repos = copy.deepcopy(repositories)
    return hub, shutil.copytree(folder, tmp_path / "first")


def test_revisions(losses_on_hub, tmp_path):
    hub, folder = losses_on_hub
    pinned = hub.commits("dataset", LOSSES)[0].oid
    load_reference_losses(folder / "reference_losses", tasks=["sort"]).push_to_hub(LOSSES, "other")
    losses = load_reference_losses(f"{LOSSES}@{pinned}")
    assert losses.source == f"{LOSSES}@{pinned}" and losses.tasks == list(SIZES)
    with pytest.raises(AMAError, match="no reference losses of config 'other'; found"):
        load_reference_losses(LOSSES, "other", revision=pinned)
    with pytest.raises(AMAError, match="cannot be pulled.*[Rr]evision"):
        load_reference_losses(f"{LOSSES}@{'0' * 40}")
    with pytest.raises(AMAError, match="There is no dataset 'org/nothing' on the Hub"):
        load_reference_losses("org/nothing")
    with pytest.raises(AMAError, match=r"Task 'code' has no reference losses in .*; found \['list', 'sort'\]"):
        load_reference_losses(LOSSES, tasks=["code"])


def test_some_of_the_tasks_and_another_one(losses_on_hub, tmp_path):
    hub, folder = losses_on_hub
    upload_pairs(hub, "brief", 16)
    tasks = [{"task": "brief", "path": "org/brief-pairs", "eval_split": "test"}, {"task": "sort"}]
    recipe = write_recipe(
        tmp_path / "more.yaml", tasks=tasks, reference_losses=LOSSES,
        push_to_hub=True, hub_model_id="org/more", hub_losses_id=LOSSES,
    )  # fmt: skip
    results = run_pipeline(*parse(recipe, "--output_dir", tmp_path / "more"))
    assert results["tasks"] == ["brief", "sort"]
    assert [path.name for path in (tmp_path / "more/specialists").iterdir()] == ["brief"]
    assert [path.name for path in (tmp_path / "more/reference_losses").iterdir()] == ["brief"]
    assert hub.exists("model", "org/more-brief") and not hub.exists("model", "org/more-sort")
    card = ModelCard.load("org/more")
    assert card.data.datasets == ["org/brief-pairs", "org/sort-pairs", LOSSES]
    assert load_dataset(LOSSES)["train"].unique("task") == ["brief", "list", "sort"]


def test_other_peoples_losses_are_not_published_again(losses_on_hub, tmp_path):
    """Nor put back to an older commit of theirs."""
    hub, _ = losses_on_hub
    upload_pairs(hub, "brief", 16)
    tasks = [{"task": "brief", "path": "org/brief-pairs", "eval_split": "test"}, {"task": "sort"}]
    recipe = write_recipe(
        tmp_path / "more.yaml", tasks=tasks, reference_losses=LOSSES, push_to_hub=True, hub_model_id="alice/more"
    )
    run_pipeline(*parse(recipe, "--output_dir", tmp_path / "more"))
    assert load_dataset("alice/more-reference-losses")["train"].unique("task") == ["brief"]
    text = ModelCard.load("alice/more").text
    assert f"datasets/{LOSSES}/tree/" in text and "datasets/alice/more-reference-losses)" in text


def test_links_of_a_card_on_losses_from_elsewhere(losses_on_hub, tmp_path):
    hub, folder = losses_on_hub
    losses = load_reference_losses(folder / "reference_losses")
    losses.push_to_hub(LOSSES, specialists={"list": "org/list-expert"})
    losses.push_to_hub(LOSSES)  # does not forget the specialist that the card names
    recipe = write_recipe(
        tmp_path / "r.yaml", without=("tasks",), reference_losses=LOSSES, push_to_hub=True, hub_model_id="alice/reuse"
    )
    run_pipeline(*parse(recipe, "--output_dir", tmp_path / "out"))
    card = ModelCard.load("alice/reuse")
    assert card.data.datasets == [*(f"org/{task}-pairs" for task in SIZES), LOSSES]
    assert "https://huggingface.co/org/list-expert)" in card.text
    # From a folder: its way is nobody's business
    recipe = write_recipe(tmp_path / "s.yaml", without=("tasks",), reference_losses=str(folder / "reference_losses"))
    run_pipeline(*parse(recipe, "--output_dir", tmp_path / "local"))
    text = (tmp_path / "local/generalists/ama_s/README.md").read_text()
    assert str(tmp_path) not in text and "`reference_losses` (local)" in text


def test_the_recipe_in_the_losses_card_is_one_that_they_fit(losses_on_hub, tmp_path):
    text = DatasetCard.load(LOSSES).text
    path = tmp_path / "card.yaml"
    path.write_text(text.split("```yaml\n")[1].split("```")[0])
    assert run_pipeline(*parse(path, *CPU, "--output_dir", tmp_path / "card", "--max_steps", 2))


def test_a_specialist_of_a_branch_is_linked_by_its_commit(losses_on_hub, tmp_path):
    hub, folder = losses_on_hub
    commit = hub.write(
        "model",
        "org/list-expert",
        {path.name: path.read_bytes() for path in (folder / "specialists/list").iterdir() if path.is_file()},
    )
    tasks = [
        {"task": "list", "path": "org/list-pairs", "data_files": {"train": "train.jsonl"}, "specialist": "org/list-expert@main"},
        {"task": "sort", "path": "org/sort-pairs", "eval_split": "test"},
    ]  # fmt: skip
    recipe = write_recipe(tmp_path / "r.yaml", tasks=tasks, push_to_hub=True, hub_model_id="alice/pulled")
    run_pipeline(*parse(recipe, "--output_dir", tmp_path / "out"))
    for text in (ModelCard.load("alice/pulled").text, DatasetCard.load("alice/pulled-reference-losses").text):
        assert f"https://huggingface.co/org/list-expert/tree/{commit}" in text
        assert (
            "https://huggingface.co/datasets/org/list-pairs/tree/" in text
        )  # `data_files` of it make it no local data


def test_what_is_no_secret_and_what_is():
    from trl_ama.common.secrets import is_secret, public_name

    assert all(
        map(is_secret, ("token", "hub_token", "use_auth_token", "api_key", "aws_secret_access_key", "password"))
    )
    assert not any(map(is_secret, ("pad_token", "eos_token", "include_num_input_tokens_seen", "max_tokens", "keys")))
    assert public_name("https://me:pw@host/a.jsonl?X-Amz-Signature=abc") == "https://host/a.jsonl"
    assert public_name("/home/me/pairs.jsonl") == "pairs.jsonl"


def test_the_innermost_difference_is_named():
    from trl_ama.common.fingerprint import first_difference

    ours, theirs = ({"losses": {"list": {"beta": 1}, "sort": {"length": length}}} for length in (64, 32))
    assert first_difference(ours, theirs) == ("losses.sort.length", 64, 32)


def test_losses_of_other_settings(losses_on_hub, tmp_path, monkeypatch):
    monkeypatch.setattr(DPOTrainer, "train", lambda *args, **kwargs: pytest.fail("something was trained"))
    recipe = write_recipe(tmp_path / "r.yaml", reference_losses=LOSSES, without=("tasks",))
    fix = "leave the task out of `reference_losses`"
    with pytest.raises(AMAError, match=f"max_length=64, but this run has max_length=48.*{fix}"):
        run_pipeline(*parse(recipe, "--output_dir", tmp_path / "out", "--max_length", 48))
    with pytest.raises(AMAError, match="dtype='float32', but this run has dtype='bfloat16'"):
        run_pipeline(*parse(recipe, "--output_dir", tmp_path / "out", "--dtype", "bfloat16"))
    recipe = write_recipe(tmp_path / "s.yaml", reference_losses=LOSSES, tasks=[{"task": "code"}, {"task": "chat"}])
    with pytest.raises(AMAError, match=r"hold none of the recipe's tasks \['code', 'chat'\]"):
        run_pipeline(*parse(recipe, "--output_dir", tmp_path / "out"))
    # A task that the dataset lacks, and no path to make it from
    recipe = write_recipe(tmp_path / "t.yaml", reference_losses=LOSSES, tasks=[{"task": "list"}, {"task": "chat"}])
    with pytest.raises(AMAError, match="Task 'chat' has no 'path'"):
        run_pipeline(*parse(recipe, "--output_dir", tmp_path / "out"))


def test_a_base_model_that_moved_on(losses_on_hub, model_dir, tmp_path):
    """The losses hold for a commit of the base model, not for a name."""
    hub, _ = losses_on_hub
    hub.write("model", "org/base", {"README.md": "A new commit"})
    recipe = write_recipe(tmp_path / "r.yaml", reference_losses=LOSSES, without=("tasks",))
    with pytest.raises(AMAError, match="base_model='org/base@[0-9a-f]{40}', but this run has base_model='org/base@"):
        run_pipeline(*parse(recipe, "--output_dir", tmp_path / "out"))
    old = hub.commits("model", "org/base")[1].oid
    run_pipeline(*parse(recipe, "--output_dir", tmp_path / "out", "--model_revision", old))


def test_rows_train_as_they_are(losses_on_hub, quick_args):
    losses = load_reference_losses(LOSSES)
    trainer = AMATrainer(
        model="org/base",
        args=quick_args(),
        train_dataset=losses["train"],
        eval_dataset=losses["test"],
        peft_config=LoraConfig(target_modules="all-linear"),
    )
    assert trainer.has_reference_losses and trainer.task_names == ["list", "sort"]
    assert np.isfinite(trainer.evaluate()["eval_worst_excess"])
    other = AMATrainer(
        model="org/base",
        args=quick_args(max_length=12),
        train_dataset=make_dataset({"list": 8, "sort": 8}),
        peft_config=LoraConfig(target_modules="all-linear"),
    )
    assert not other.has_reference_losses
    with pytest.raises(AMAError, match="'chosen_tokens' differs from this run's tokenisation in .* of .* pairs"):
        AMATrainer(
            model="org/base",
            args=quick_args(max_length=9),
            train_dataset=losses["train"],
            peft_config=LoraConfig(target_modules="all-linear"),
        )


def test_own_pairs_are_joined(losses_on_hub):
    losses = load_reference_losses(LOSSES, tasks=["sort"])
    pairs = load_dataset("org/sort-pairs", split="train")
    joined = join_reference_losses(pairs.add_column("task", ["sort"] * len(pairs)), losses["train"])
    assert joined["specialist_chosen_logps"][:] == losses["train"]["specialist_chosen_logps"][:]
    others = load_dataset("org/list-pairs", split="train")
    with pytest.raises(AMAError, match="lack 24 of the 24 pairs of task 'sort'"):
        join_reference_losses(others.add_column("task", ["sort"] * len(others)), losses["train"])


@pytest.mark.parametrize("seed", [0, 1])
def test_the_first_batch_tells_another_base_model(losses_on_hub, quick_args, tokenizer, seed, tmp_path, caplog):
    """Seed 0 is the model that made the losses."""
    save(make_model(len(tokenizer), seed), tokenizer, tmp_path / "model")
    trainer = AMATrainer(
        model=str(tmp_path / "model"),
        args=quick_args(AMAConfig, max_steps=1),
        train_dataset=load_reference_losses(LOSSES)["train"],
        peft_config=LoraConfig(target_modules="all-linear"),
    )
    said = []
    trainer.report_foreign_reference = said.append
    trainer.train()
    assert len(said) == seed
    assert not seed or "nats a token on the first batch: another base model" in said[0]
