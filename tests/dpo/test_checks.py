"""Bad input gets one clear sentence that names both sides and the fix, before anything is trained."""

import json

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, IterableDataset
from tiny_models import lora, make_model
from tiny_pairs import make_dataset, with_reference_columns
from trl import DPOConfig, DPOTrainer

from trl_ama import AMAConfig, AMAError, AMATrainer, TaskConfig, TaskMixtureConfig, load_tasks
from trl_ama.tasks.config import check_task_names


SIZES = {"list": 8, "sort": 8}


@pytest.fixture
def refuse(model_dir, quick_args, monkeypatch):
    """Builds an AMATrainer, expects an AMAError before anything is trained, and returns its text."""
    monkeypatch.setattr(DPOTrainer, "train", lambda *args, **kwargs: pytest.fail("something was trained"))

    def build(dataset=None, eval_dataset=None, config=None, **kwargs):
        with pytest.raises(AMAError) as caught:
            AMATrainer(
                model_dir,
                args=config if config is not None else quick_args(),
                train_dataset=make_dataset(SIZES) if dataset is None else dataset,
                eval_dataset=eval_dataset,
                peft_config=lora(),
                **kwargs,
            )
        text = str(caught.value)
        assert "\n" not in text
        return text

    return build


def test_no_task_column(refuse):
    text = refuse(make_dataset(SIZES, labelled=False))
    assert "no 'task' column; found ['prompt', 'chosen', 'rejected']" in text and "add_column" in text


def test_no_rows(refuse):
    assert "has no rows" in refuse(make_dataset(SIZES).select([]))


def test_a_task_with_no_rows(refuse):
    dataset = make_dataset(SIZES).cast_column("task", ClassLabel(names=["list", "sort", "code"]))
    text = refuse(dataset)
    assert "Task 'code' has no rows" in text and "['list', 'sort']" in text


def test_rows_without_a_task(refuse):
    dataset = make_dataset(SIZES)
    dataset = dataset.remove_columns("task").add_column("task", ["list"] * 15 + [None])
    assert "rows whose 'task' is empty" in refuse(dataset)


@pytest.mark.parametrize("mixing", ["ama_s", "ama_r"])
def test_a_single_task_with_an_adaptive_strategy(refuse, quick_args, mixing):
    text = refuse(make_dataset({"list": 8}), config=quick_args(mixing=mixing))
    assert f"mixing='{mixing}' balances several tasks" in text and "mixing='proportional'" in text


@pytest.mark.parametrize("name", ["../x", "", "a/b", "..", ".hidden", "a b", "x" * 65, "tab\t", "a..b"])
def test_task_names_that_cannot_be_folder_names(refuse, name):
    dataset = make_dataset(SIZES)
    dataset = dataset.remove_columns("task").add_column("task", ["list"] * 8 + [name] * 8)
    assert f"Task name {name!r} cannot be a folder name" in refuse(dataset)


def test_task_names_alike():
    with pytest.raises(AMAError, match="Two tasks are named 'code'. Rename one, or leave one out"):
        check_task_names(["code", "helpful", "code"])
    with pytest.raises(AMAError, match="'Code' and 'code' are alike"):
        check_task_names(["Code", "code"])
    with pytest.raises(AMAError, match="There are no tasks"):
        check_task_names([])


def test_eval_tasks_that_are_not_train_tasks(refuse):
    dataset = make_dataset(SIZES)
    held_out = dataset.remove_columns("task").add_column("task", ["list"] * 8 + ["sorts"] * 8)
    text = refuse(dataset, held_out)
    assert "eval_dataset has task 'sorts'" in text and "['list', 'sort']" in text and "Did you mean 'sort'?" in text


def test_a_specialist_missing_for_one_task(refuse):
    text = refuse(specialists={"list": "somewhere"})
    assert "Task 'sort' has no specialist; there are specialists for ['list']" in text
    assert "trl ama-specialists" in text


def test_a_specialist_for_an_unknown_task(refuse):
    text = refuse(specialists={"list": "a", "sort": "b", "sorting": "c"})
    assert "specialist for 'sorting', but the training tasks are ['list', 'sort']" in text


def test_a_specialist_that_is_not_there(refuse, tmp_path):
    (tmp_path / "empty").mkdir()
    text = refuse(specialists=dict.fromkeys(SIZES, str(tmp_path / "empty")))
    assert "neither an adapter" in text and str(tmp_path / "empty") in text


def test_a_specialist_of_another_base_model(refuse, tmp_path, model_dir):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "other/base", "peft_type": "LORA"})
    )
    text = refuse(specialists=dict.fromkeys(SIZES, str(adapter)))
    assert "adapter of 'other/base'" in text and f"base model is '{model_dir}'" in text


def test_specialists_are_checked_before_a_pair_is_scored(refuse, tmp_path, monkeypatch):
    monkeypatch.setattr("trl_ama.dpo.scoring.score_policies", lambda *args: pytest.fail("pairs were scored"))
    (tmp_path / "broken").mkdir()
    text = refuse(specialists=dict.fromkeys(SIZES, str(tmp_path / "broken")))
    assert "neither an adapter (no adapter_config.json) nor a model" in text


def test_a_full_specialist_with_another_vocabulary(refuse, tmp_path):
    make_model(77).save_pretrained(tmp_path / "other")
    text = refuse(specialists=dict.fromkeys(SIZES, str(tmp_path / "other")))
    assert "vocabulary of 77 tokens" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("column", ["ref_chosen_logps", "specialist_rejected_logps"])
def test_reference_losses_that_are_not_finite(refuse, value, column):
    dataset = with_reference_columns(make_dataset(SIZES))
    values = np.array(dataset[column], dtype=np.float32)
    values[3] = value
    text = refuse(dataset.remove_columns(column).add_column(column, values))
    assert f"'{column}'" in text and "1 of 16 pairs" in text and "row 3" in text and "trl ama-losses" in text


def test_some_of_the_columns(refuse):
    dataset = with_reference_columns(make_dataset(SIZES))
    assert "lacks ['ref_rejected_logps']" in refuse(dataset.remove_columns("ref_rejected_logps"))
    text = refuse(dataset.remove_columns(["ref_chosen_logps", "ref_rejected_logps"]))
    assert "lacks ['ref_chosen_logps', 'ref_rejected_logps']" in text


def test_columns_and_a_reference_model(refuse, tokenizer):
    text = refuse(with_reference_columns(make_dataset(SIZES)), ref_model=make_model(len(tokenizer)))
    assert "`ref_model` was passed too" in text


@pytest.mark.parametrize("smoothing", [-0.1, 1.5, float("nan")])
def test_smoothing_outside_its_range(quick_args, smoothing):
    with pytest.raises(AMAError, match=r"must lie in \[0, 1\], got"):
        quick_args(smoothing=smoothing)


@pytest.mark.parametrize("mixing_lr", [0, -1.0, "fast", float("nan"), float("inf")])
def test_mixing_lr_that_is_not_positive(quick_args, mixing_lr):
    with pytest.raises(AMAError, match=f"mixing_lr must be 'auto' or a positive number, got {mixing_lr!r}"):
        quick_args(mixing_lr=mixing_lr)


@pytest.mark.parametrize("loss_type", ["aot", "aot_unpaired", "sft"])
def test_loss_types_without_a_per_pair_meaning(quick_args, loss_type):
    with pytest.raises(AMAError, match=f"loss_type '{loss_type}' has no per-pair meaning"):
        quick_args(loss_type=["sigmoid", loss_type], loss_weights=[1.0, 0.5])


def test_exo_without_label_smoothing(quick_args):
    with pytest.raises(AMAError, match=r"'label_smoothing' must lie in \(0, 1\) with loss_type 'exo_pair', got 0.0"):
        quick_args(loss_type=["exo_pair"])


def test_unknown_strategy_clip_and_sampling(quick_args):
    with pytest.raises(AMAError, match="Unknown mixing 'amas'.*Did you mean 'ama_s'"):
        quick_args(mixing="amas")
    with pytest.raises(AMAError, match=r"excess_clip must be one of \['pair', 'task', 'none'\], got 'both'"):
        quick_args(excess_clip="both")
    with pytest.raises(AMAError, match="sampling must be one of"):
        quick_args(sampling="other")
    with pytest.raises(AMAError, match="specialists maps each task to its adapter, got 'path'"):
        AMAConfig("out", specialists="path", bf16=False, use_cpu=True)


def test_a_dpo_config(refuse, quick_args):
    text = refuse(config=quick_args(DPOConfig))
    assert "takes an AMAConfig as `args`, got DPOConfig" in text


def test_one_stream_of_unknown_tasks(refuse):
    text = refuse(IterableDataset.from_generator(lambda: iter(make_dataset(SIZES))))
    assert "one IterableDataset, whose tasks cannot be known" in text and "a stream per task" in text


def test_arguments_that_contradict_the_strategy(refuse, quick_args):
    assert "both decide which pairs come next" in refuse(config=quick_args(train_sampling_strategy="group_by_length"))
    moving = quick_args(sync_ref_model=True)
    assert "sync_ref_model moves the reference" in refuse(with_reference_columns(make_dataset(SIZES)), config=moving)
    assert "use_weighting (WPO)" in refuse(config=quick_args(use_weighting=True))
    best = {"metric_for_best_model": "eval_worst_excess", "eval_strategy": "steps", "save_strategy": "best"}
    config = quick_args(mixing="uniform", **best)
    assert "needs reference losses, and the dataset has none" in refuse(config=config)
    train, plain = with_reference_columns(make_dataset(SIZES)), make_dataset(SIZES, seed=1)
    text = refuse(train, plain, config=quick_args(**best))
    assert "needs ['specialist_chosen_logps', 'specialist_rejected_logps'] of the held-out pairs too" in text
    text = refuse(train, plain.remove_columns("task"), config=quick_args(**best))
    assert "needs held-out pairs with a 'task' column" in text


def test_a_task_that_does_not_fit_at_all(refuse, quick_args):
    text = refuse(config=quick_args(max_length=3))
    assert "All 8 pairs of task 'list' were dropped" in text and "max_length (3)" in text


# ---- Recipes ----


def test_unknown_key_in_a_task():
    with pytest.raises(AMAError, match="Unknown key 'eval_spilt' in task 'list'.*Did you mean 'eval_split'"):
        TaskConfig.from_entry({"task": "list", "path": "x", "eval_spilt": "test"})
    with pytest.raises(AMAError, match="Unknown key 'fraction'.*mixing strategy sets the shares"):
        TaskConfig.from_entry({"task": "list", "path": "x", "fraction": 0.5})


@pytest.mark.parametrize("entry", [{"task": "list"}, {"path": "x"}, {"task": "", "path": "x"}])
def test_incomplete_task(entry):
    with pytest.raises(AMAError, match="Every task needs 'task' and 'path'"):
        load_tasks(TaskMixtureConfig(tasks=[entry]))


@pytest.mark.parametrize("entry", ["just text", "[1, 2]", "{task: [", 7, None])
def test_a_task_that_is_no_mapping(entry):
    with pytest.raises(AMAError, match="must be a mapping"):
        TaskConfig.from_entry(entry)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"max_train_pairs": 0}, "'max_train_pairs' must be at least 1, got 0"),
        ({"test_split_size": 1.0}, r"must lie in \(0, 1\), got 1.0"),
        ({"tasks": {"task": "x"}}, "`tasks` must be a list"),
        ({"tasks": [{"task": "A", "path": "x"}, {"task": "a", "path": "x"}]}, "'A' and 'a' are alike"),
    ],
)
def test_task_mixture_values(changes, text):
    with pytest.raises(AMAError, match=text):
        TaskMixtureConfig(**changes)


def test_dataset_helper_is_sound():
    """The fixtures above rely on it."""
    assert isinstance(make_dataset(SIZES), Dataset) and len(make_dataset(SIZES)) == 16
