"""What a run pushes, seen from the other side: by the Hub's own clients."""

import copy
import json
import shutil

import numpy as np
import pytest
import yaml
from datasets import load_dataset
from hub_world import HELD_OUT, SIZES, parse, upload_model, upload_pairs, write_recipe
from huggingface_hub import DatasetCard, ModelCard
from peft import AutoPeftModelForCausalLM
from pushed_runs import leave_out
from surroundings import forget_downloads, server
from tiny_models import lora
from tiny_pairs import make_dataset, with_reference_columns
from trl import DPOTrainer

from trl_ama import AMAError, load_reference_losses, run_pipeline
from trl_ama.common.run_folder import FINGERPRINT_FILE
from trl_ama.reference_losses.columns import LOGP_COLUMNS


pytestmark = pytest.mark.slow


LOSSES = "org/mine-reference-losses"


@pytest.fixture(scope="module")
def world(model_dir, tmp_path_factory):
    """The Hub after a whole run was pushed, the run's folder and its recipe."""
    folder = tmp_path_factory.mktemp("publishing")
    server.reset()
    forget_downloads()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("HF_TOKEN", server.WRITE_TOKEN)
        commits = {"base": upload_model(server, model_dir)}
        commits |= {task: upload_pairs(server, task, count) for task, count in SIZES.items()}
        recipe = write_recipe(
            folder / "recipe.yaml", push_to_hub=True, hub_model_id="org/mine", compare=["proportional"]
        )
        results = run_pipeline(*parse(recipe, "--output_dir", folder / "run"))
    repos = copy.deepcopy(server.repos)
    server.reset()
    return repos, folder, recipe, commits, results


@pytest.fixture
def published(hub, world, tmp_path):
    """The same, to change at will: the Hub, a copy of the run's folder, the recipe."""
    hub.repos = copy.deepcopy(world[0])
    shutil.copytree(world[1] / "run", tmp_path / "run")
    return hub, tmp_path / "run", world[2]


@pytest.fixture
def nothing_computed(monkeypatch):
    """Fails the test if anything is trained or scored."""
    monkeypatch.setattr(DPOTrainer, "train", lambda *args, **kwargs: pytest.fail("something was trained"))
    for name in ("pipeline.evaluation.score_pairs", "pipeline.specialists.score_pairs", "dpo.scoring.score_pairs"):
        monkeypatch.setattr(f"trl_ama.{name}", lambda *args: pytest.fail("pairs were scored"))
    for name in ("pipeline.losses", "dpo.scoring"):
        monkeypatch.setattr(
            f"trl_ama.{name}.score_reference_and_specialist", lambda *args: pytest.fail("pairs were scored")
        )


def test_specialists(published, world):
    hub, folder, _ = published
    commits = world[3]
    for task in SIZES:
        tree = hub.tree("model", f"org/mine-{task}")
        assert set(tree) >= {"adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json"}
        assert not [name for name in tree if name.endswith(".bin") or name.startswith("checkpoint") or "state" in name]
        assert (
            tree["adapter_model.safetensors"]
            == (folder / f"specialists/{task}/adapter_model.safetensors").read_bytes()
        )
        card = ModelCard.load(f"org/mine-{task}")
        assert card.data.base_model == "org/base" and card.data.datasets == [f"org/{task}-pairs"]
        assert {"trl", "ama", "ama-specialist"} <= set(card.data.tags) and card.data.library_name == "peft"
        assert commits["base"] in card.text and commits[task] in card.text
        result = json.loads((folder / f"specialists/{task}/stage.json").read_text())["result"]
        figures = {entry.metric_type: entry.metric_value for entry in card.data.eval_results}
        assert figures["accuracy"] == pytest.approx(result["eval_accuracy"])
        assert f"| reward accuracy | 0.500 | {result['eval_accuracy']:.3f}" in card.text
        assert f"| loss            | 0.693 | {result['eval_loss']:.3f}" in card.text
        AutoPeftModelForCausalLM.from_pretrained(f"org/mine-{task}")


def test_the_yaml_in_a_specialists_card_makes_it_again(published, tmp_path):
    hub, folder, _ = published
    text = ModelCard.load("org/mine-sort").text
    recipe = tmp_path / "again.yaml"
    recipe.write_text(text.split("```yaml\n")[1].split("```")[0])
    run_pipeline(*parse(recipe, "--output_dir", tmp_path / "again", "--report_to", "none"), stages=("specialists",))
    again, first = (
        (path / "specialists/sort/adapter_model.safetensors").read_bytes() for path in (tmp_path / "again", folder)
    )
    assert again == first


def test_a_specialist_is_found_by_its_tags(published):
    from huggingface_hub import list_datasets, list_models

    assert {model.id for model in list_models(filter="ama-specialist")} == {f"org/mine-{task}" for task in SIZES}
    assert [dataset.id for dataset in list_datasets(filter="ama-reference-losses")] == [LOSSES]


def test_losses_by_datasets_alone(published):
    _, folder, _ = published
    losses = load_dataset(LOSSES)
    assert {split: len(part) for split, part in losses.items()} == {
        "train": sum(SIZES.values()),
        "test": HELD_OUT * len(SIZES),
    }
    ours = load_reference_losses(folder / "reference_losses")
    for split, part in losses.items():
        assert part.column_names == ours[split].column_names
        assert part["pair_id"][:] == ours[split]["pair_id"][:]
        for column in LOGP_COLUMNS:
            np.testing.assert_array_equal(part[column][:], ours[split][column][:])
    assert losses["train"].unique("task") == list(SIZES)


def test_the_losses_card(published, world):
    commits = world[3]
    card = DatasetCard.load(LOSSES)
    data = card.data.to_dict()
    assert data["configs"] == [
        {
            "config_name": "default",
            "data_files": [{"split": split, "path": f"default/*/{split}.parquet"} for split in ("train", "test")],
        }
    ]
    run = data["trl_ama"]["default"]
    assert run["made_with"]["base_model"] == f"org/base@{commits['base']}" and run["made_with"]["max_length"] == 64
    for task, count in SIZES.items():
        entry = run["tasks"][task]
        assert entry["rows"] == {"train": count, "test": HELD_OUT}
        assert entry["data"] == f"org/{task}-pairs@{commits[task]}" and entry["specialist_repo"] == f"org/mine-{task}"
        assert f"https://huggingface.co/org/mine-{task}" in card.text
    for column in (*LOGP_COLUMNS, "pair_id", "chosen_tokens", "task"):
        assert f"`{column}`" in card.text
    assert f'load_dataset("{LOSSES}")' in card.text


def test_the_generalists_card(published, world):
    commits, results = world[3], world[4]
    hub, folder, _ = published
    card = ModelCard.load("org/mine")
    text = card.text
    assert card.data.base_model == "org/base" and card.data.library_name == "peft"
    assert card.data.datasets == [*(f"org/{task}-pairs" for task in SIZES), LOSSES]
    assert card.data.tags == sorted({*card.data.tags}) and {"ama", "trl", "dpo"} <= set(card.data.tags)
    for policy, figures in results["policies"].items():
        assert ("this model (ama_s)" if policy == "ama_s" else policy) in text
        for task in SIZES:
            for key in ("accuracy", "margin", "excess"):
                assert f"{figures['by_task'][task][key]:.3f}" in text
    assert "**worst task**" in text and "![" in text and "mixture.png" in hub.tree("model", "org/mine")
    for link in (
        *(f"huggingface.co/org/mine-{task})" for task in SIZES),
        *(f"huggingface.co/datasets/org/{task}-pairs/tree/{commits[task]}" for task in SIZES),
        f"huggingface.co/org/base/tree/{commits['base']}",
        f"huggingface.co/datasets/{LOSSES}",
    ):
        assert link in text
    assert "merge_and_unload" in text and "## Limits" in text and "learning_rate: 0.005" in text
    by_name = {(entry.dataset_name, entry.metric_type): entry.metric_value for entry in card.data.eval_results}
    for task in SIZES:
        for key in ("accuracy", "margin", "excess"):
            assert by_name[task, key] == pytest.approx(results["policies"]["ama_s"]["by_task"][task][key], abs=1e-5)
    summary = results["policies"]["ama_s"]["summary"]
    assert by_name["all tasks", "worst_accuracy"] == pytest.approx(summary["worst_accuracy"], abs=1e-5)
    card.validate()


def test_the_snippets_of_the_generalists_card_load_it(published):
    text = ModelCard.load("org/mine").text
    names = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    assert not hasattr(names["model"], "peft_config") and names["tokenizer"].chat_template


def test_pushing_again_changes_nothing(published, nothing_computed):
    hub, folder, recipe = published
    before = {key: [commit.oid for commit in repo.log("main")] for key, repo in hub.repos.items()}
    run_pipeline(*parse(recipe, "--output_dir", folder))
    assert before == {key: [commit.oid for commit in repo.log("main")] for key, repo in hub.repos.items()}


def test_another_task_leaves_the_others_alone(published, tmp_path):
    hub, folder, recipe = published
    upload_pairs(hub, "brief", 16)
    before = hub.tree("dataset", LOSSES)
    # A stranger's run: their own task, appended to the same dataset
    changes = {"tasks": [{"task": "brief", "path": "org/brief-pairs", "eval_split": "test"}]}
    other = write_recipe(
        tmp_path / "other.yaml", push_to_hub=True, hub_model_id="org/other", hub_losses_id=LOSSES, **changes
    )
    run_pipeline(*parse(other, "--output_dir", tmp_path / "other"), stages=("specialists", "losses"))
    after = hub.tree("dataset", LOSSES)
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    assert changed == {
        "README.md",
        *(f"default/brief/{name}" for name in ("train.parquet", "test.parquet", FINGERPRINT_FILE)),
    }
    assert load_dataset(LOSSES)["train"].unique("task") == ["brief", "list", "sort"]
    card = DatasetCard.load(LOSSES)
    assert set(card.data.to_dict()["trl_ama"]["default"]["tasks"]) == {"list", "sort", "brief"}
    assert all(f"| {task} " in card.text for task in ("list", "sort", "brief"))


def test_what_an_owner_wrote_into_the_card_stays(published):
    hub, folder, recipe = published
    card = DatasetCard.load(LOSSES)
    card.data.license = "apache-2.0"
    card.text = card.text.replace("# Reference losses", "# My losses\n\nFor my team.")
    card.push_to_hub(LOSSES)
    load_reference_losses(folder / "reference_losses", tasks=["list"]).push_to_hub(LOSSES, "second")
    card = DatasetCard.load(LOSSES)
    assert card.data.license == "apache-2.0" and "For my team." in card.text
    assert [entry["config_name"] for entry in card.data.to_dict()["configs"]] == ["default", "second"]
    assert len(load_dataset(LOSSES, "second", split="train")) == SIZES["list"]
    assert load_reference_losses(LOSSES).tasks == ["list", "sort"]  # `default`
    assert load_reference_losses(LOSSES, "second").tasks == ["list"]
    with pytest.raises(AMAError, match=r"no reference losses of config 'third'; found \['default', 'second'\]"):
        load_reference_losses(LOSSES, "third")


def test_one_config_is_one_run(published, tmp_path):
    hub, folder, _ = published
    copy_of = tmp_path / "losses"
    shutil.copytree(folder / "reference_losses" / "sort", copy_of / "sort")
    note = json.loads((copy_of / "sort" / FINGERPRINT_FILE).read_text())
    note["fingerprint"]["max_length"] = 128
    (copy_of / "sort" / FINGERPRINT_FILE).write_text(json.dumps(note))
    other = load_reference_losses(copy_of)
    with pytest.raises(AMAError, match="max_length=128.*max_length=64.*another config"):
        other.push_to_hub(LOSSES)
    other.push_to_hub(LOSSES, "longer")
    assert load_reference_losses(LOSSES, "longer").fingerprints["sort"]["max_length"] == 128


def test_a_task_pushed_again_replaces_its_files(published, tmp_path):
    hub, folder, _ = published
    copy_of = tmp_path / "losses"
    shutil.copytree(folder / "reference_losses" / "sort", copy_of / "sort")
    note = json.loads((copy_of / "sort" / FINGERPRINT_FILE).read_text())
    del note["files"]["test.parquet"]
    (copy_of / "sort" / FINGERPRINT_FILE).write_text(json.dumps(note))
    load_reference_losses(copy_of).push_to_hub(LOSSES)
    assert "default/sort/test.parquet" not in hub.tree("dataset", LOSSES)
    assert len(load_dataset(LOSSES, split="test")) == HELD_OUT


def test_without_texts(published, tmp_path):
    hub, folder, _ = published
    losses = load_reference_losses(folder / "reference_losses")
    losses.push_to_hub("org/ids", include_text=False)
    assert "prompt" not in load_dataset("org/ids", split="train").column_names
    words = losses["train"][0]["prompt"][0]["content"].encode()
    assert not any(words in content for content in hub.tree("dataset", "org/ids").values())
    recipe = write_recipe(tmp_path / "r.yaml", reference_losses="org/ids", without=("tasks",))
    with pytest.raises(AMAError, match="'list' in 'org/ids' hold ids and numbers, but no texts.*`path`"):
        run_pipeline(*parse(recipe, "--output_dir", tmp_path / "out"))
    recipe = write_recipe(tmp_path / "own.yaml", reference_losses="org/ids")
    own = run_pipeline(*parse(recipe, "--output_dir", tmp_path / "own"))
    assert not (tmp_path / "own" / "specialists").exists()
    # As with the texts of the dataset
    recipe = write_recipe(tmp_path / "theirs.yaml", reference_losses=LOSSES, without=("tasks",))
    theirs = run_pipeline(*parse(recipe, "--output_dir", tmp_path / "theirs"))
    assert own["policies"]["ama_s"]["by_task"]["sort"] == pytest.approx(theirs["policies"]["ama_s"]["by_task"]["sort"])


def test_branch_and_privacy(published, tmp_path, nothing_computed):
    hub, folder, recipe = published
    flags = (
        "--output_dir",
        folder,
        "--hub_model_id",
        "org/quiet",
        "--hub_revision",
        "second-try",
        "--hub_private_repo",
    )
    run_pipeline(*parse(recipe, *flags, "true"))
    for kind, name in (("model", "quiet"), ("model", "quiet-sort"), ("dataset", "quiet-reference-losses")):
        assert hub.is_private(kind, f"org/{name}")
        assert set(hub.tree(kind, f"org/{name}")) == {".gitattributes"}  # nothing on main
        readme = hub.tree(kind, f"org/{name}", "second-try")["README.md"].decode()
        assert 'revision="second-try"' in readme  # or the card's own snippets would find nothing
    assert load_reference_losses("org/quiet-reference-losses@second-try").tasks == list(SIZES)
    assert len(load_dataset("org/quiet-reference-losses", revision="second-try", split="train")) == sum(SIZES.values())


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("end", set()),
        ("every_save", set()),
        ("checkpoint", {"last-checkpoint"}),
        ("all_checkpoints", {"checkpoint-2", "checkpoint-4"}),
    ],
)
def test_hub_strategy(published, monkeypatch, strategy, expected):
    hub, folder, recipe = published
    leave_out(monkeypatch)
    shutil.rmtree(folder / "generalists")
    flags = (
        "--hub_model_id",
        f"org/{strategy}",
        "--hub_strategy",
        strategy,
        "--save_strategy",
        "steps",
        "--save_steps",
        2,
    )
    run_pipeline(*parse(recipe, "--output_dir", folder, *flags, "--compare", "uniform"), stages=("train",))
    tree = hub.tree("model", f"org/{strategy}")
    assert {name.split("/")[0] for name in tree if "checkpoint" in name} == expected
    assert tree["README.md"] == (folder / "generalists/ama_s/README.md").read_bytes()
    titles = [commit.title for commit in hub.commits("model", f"org/{strategy}")]
    assert any("Training in progress" in title for title in titles) == (strategy != "end")
    for name in expected:
        assert f"{name}/trainer_state.json" in tree


def test_own_names(published, nothing_computed):
    hub, folder, recipe = published
    flags = (
        "--hub_specialist_id",
        "alice/{task}-expert",
        "--hub_losses_id",
        "alice/all-losses",
        "--losses_config",
        "v1",
    )
    run_pipeline(*parse(recipe, "--output_dir", folder, *flags))
    assert all(hub.exists("model", f"alice/{task}-expert") for task in SIZES)
    assert "v1/sort/train.parquet" in hub.tree("dataset", "alice/all-losses")
    assert "huggingface.co/alice/sort-expert" in ModelCard.load("org/mine").text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--hub_specialist_id", "org/one"), "every specialist would go to that one repository. Put {task} into it"),
        (
            ("--hub_specialist_id", "org/mine{task}", "--hub_model_id", "org/minesort"),
            "would both go to 'org/minesort'",
        ),
        (("--hub_model_id", "strangers/mine"), r"can write to \['alice', 'org'\] only"),
        (("--hub_model_id", "org/a/b"), "cannot be a Hub id"),
        (("--losses_config", "../x"), "cannot be a folder name"),
    ],
)
def test_names_that_cannot_be(published, nothing_computed, flags, message):
    hub, folder, recipe = published
    before = set(hub.repos)
    with pytest.raises(AMAError, match=message.replace("{", r"\{")):
        run_pipeline(*parse(recipe, "--output_dir", folder, *flags))
    assert set(hub.repos) == before


def test_the_recipe_in_the_generalists_card_parses(published, tmp_path):
    text = ModelCard.load("org/mine").text
    path = tmp_path / "card.yaml"
    hyper, recipe = (block.split("```")[0] for block in text.split("```yaml\n")[1:])
    assert yaml.safe_load(hyper)["beta"] == 0.5 and yaml.safe_load(hyper)["mixing_lr"] == "auto"
    path.write_text(recipe)
    assert yaml.safe_load(path.read_text())["tasks"][0] == {
        "task": "list",
        "path": "org/list-pairs",
        "eval_split": "test",
    }
    pipeline_args, training_args, model_args, task_args = parse(path, "--output_dir", tmp_path)
    assert training_args.mixing == "ama_s" and training_args.learning_rate == 5e-3 and model_args.lora_r == 4
    assert pipeline_args.compare == ["proportional"] and [task.task for task in task_args.tasks] == list(SIZES)


def test_without_held_out_pairs(published, tmp_path):
    hub, _, _ = published
    tasks = [{"task": task, "path": f"org/{task}-pairs"} for task in SIZES]
    recipe = write_recipe(tmp_path / "r.yaml", tasks=tasks, push_to_hub=True, hub_model_id="org/blind")
    assert run_pipeline(*parse(recipe, "--output_dir", tmp_path / "blind")) is None
    card = ModelCard.load("org/blind")
    assert "There were no held-out pairs." in card.text and "mixture.png" in hub.tree("model", "org/blind")
    assert card.data.eval_results is None and "org/list-pairs" in card.data.datasets
    assert "There were no held-out pairs." in ModelCard.load("org/blind-list").text
    assert list(load_dataset("org/blind-reference-losses")) == ["train"]


def test_the_trainer_alone(hub, model_dir, quick_args, tokenizer):
    """As a `DPOTrainer`: in Python, without the pipeline."""
    from trl_ama import AMATrainer

    upload_model(hub, model_dir)
    pairs = with_reference_columns(make_dataset({"list": 16, "sort": 8}))
    args = quick_args(
        push_to_hub=True, hub_model_id="org/alone", hub_strategy="every_save", save_strategy="steps", save_steps=2,
        eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    trainer = AMATrainer("org/base", args=args, train_dataset=pairs, eval_dataset=pairs, peft_config=lora())
    trainer.train()
    trainer.save_model(args.output_dir)
    trainer.push_to_hub(dataset_name="org/list-pairs")
    tree = hub.tree("model", "org/alone")
    assert {"adapter_model.safetensors", "README.md", "training_args.bin"} <= set(tree)
    card = ModelCard.load("org/alone")
    assert card.data.datasets == "org/list-pairs" and card.data.base_model == "org/base"
    assert "Tasks: list, sort. Optimizer steps: 4." in card.text and "mixing: ama_s" in card.text
    last = [entry for entry in trainer.state.log_history if "eval_worst_accuracy" in entry][-1]
    assert f"{last['eval_ama/accuracy/sort']:.3f}" in card.text and "After 4 optimizer steps." in card.text
    assert any("Training in progress" in commit.title for commit in hub.commits("model", "org/alone"))
    AutoPeftModelForCausalLM.from_pretrained("org/alone")


def test_an_adapter_says_which_commit_of_the_base_it_is_of(published, world):
    hub, folder, _ = published
    for place in ("specialists/list", "generalists/ama_s"):
        assert json.loads((folder / place / "adapter_config.json").read_text())["revision"] == world[3]["base"]


def test_a_stage_alone_links_what_earlier_commands_published(published, nothing_computed):
    """The card is the same whichever command pushed last."""
    hub, folder, recipe = published
    before = hub.tree("dataset", LOSSES)["README.md"]
    assert b"org/mine-sort" in before
    run_pipeline(*parse(recipe, "--output_dir", folder), stages=("losses",))
    assert hub.tree("dataset", LOSSES)["README.md"] == before
    assert len(hub.commits("dataset", LOSSES)) == 2


def test_the_same_adapter_is_drawn_whatever_was_done_before(published, tmp_path):
    """A generalist after finished specialists starts where one does that was trained in one go."""
    hub, folder, recipe = published
    first = (folder / "generalists/ama_s/adapter_model.safetensors").read_bytes()
    shutil.rmtree(folder / "generalists")
    run_pipeline(*parse(recipe, "--output_dir", folder, "--push_to_hub", "false"))
    assert (folder / "generalists/ama_s/adapter_model.safetensors").read_bytes() == first


def test_rows_that_were_changed_are_not_pushed(published):
    """The files are pushed; somebody who dropped rows would publish them all the same."""
    hub, folder, _ = published
    losses = load_reference_losses(folder / "reference_losses")
    losses["train"] = losses["train"].select(range(3))
    with pytest.raises(AMAError, match="rows were changed after they were loaded"):
        losses.push_to_hub("org/some")
    assert not hub.exists("dataset", "org/some")


def test_one_config_has_one_set_of_columns(published, tmp_path):
    hub, folder, _ = published
    load_reference_losses(folder / "reference_losses", tasks=["list"]).push_to_hub("org/mixed", include_text=False)
    sort = load_reference_losses(folder / "reference_losses", tasks=["sort"])
    with pytest.raises(AMAError, match="task 'sort' have the texts .*those of task 'list' in config .* left out"):
        sort.push_to_hub("org/mixed")
    sort.push_to_hub("org/mixed", include_text=False)
    assert len(load_dataset("org/mixed", split="train")) == sum(SIZES.values())


def test_the_card_may_say_anything(published, tmp_path):
    """What the repository holds counts: the card is for people, and its owner may have written another one."""
    hub, folder, _ = published
    hub.write("dataset", LOSSES, {"README.md": "Mine."})
    copy_of = tmp_path / "losses"
    shutil.copytree(folder / "reference_losses" / "sort", copy_of / "brief")
    note = json.loads((copy_of / "brief" / FINGERPRINT_FILE).read_text())
    note["fingerprint"] |= {"max_length": 128, "task": "brief"}
    (copy_of / "brief" / FINGERPRINT_FILE).write_text(json.dumps(note))
    load = load_reference_losses(folder / "reference_losses", tasks=["sort"])
    load.push_to_hub(LOSSES)
    data = DatasetCard.load(LOSSES).data.to_dict()
    assert set(data["trl_ama"]["default"]["tasks"]) == set(SIZES)  # `list` is still there
    assert "Mine." in DatasetCard.load(LOSSES).text


def test_links_of_an_evaluation_alone(published, nothing_computed):
    hub, folder, recipe = published
    before = ModelCard.load("org/mine")
    run_pipeline(*parse(recipe, "--output_dir", folder), stages=("eval",))
    assert ModelCard.load("org/mine").content == before.content and "not published" not in before.text


def test_a_message_names_the_key_that_was_set(published, nothing_computed):
    _, folder, recipe = published
    with pytest.raises(AMAError, match="^hub_model_id is 'strangers/x-list'"):
        run_pipeline(*parse(recipe, "--output_dir", folder, "--hub_model_id", "strangers/x"))
