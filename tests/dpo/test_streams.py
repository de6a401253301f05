"""AMATrainer on streamed tasks: the numbers of tasks in memory, resuming after every step, what is learned, what is refused."""

import logging

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset
from datasets.distributed import split_dataset_by_node
from peft import LoraConfig
from tiny_models import lora
from tiny_pairs import make_dataset, make_rows, with_reference_columns
from tiny_runs import assert_learns, logged, losses_of, weights_of

from trl_ama import AMATrainer, TaskConfig
from trl_ama.common.errors import AMAError
from trl_ama.dpo.checks import kept_tokens
from trl_ama.scripts.common import check_keys, make_parser, read_config


SIZES = {"list": 30, "sort": 18, "brief": 12}


def in_memory(sizes=SIZES, seed=0):
    return with_reference_columns(make_dataset(sizes, seed))


def parts_of(data: Dataset, sizes=SIZES) -> dict[str, Dataset]:
    ends = np.cumsum(list(sizes.values()))
    return {
        task: data.select(range(int(end) - size, int(end))) for end, (task, size) in zip(ends, sizes.items(), strict=True)
    }  # fmt: skip


def streams_of(data: Dataset, sizes=SIZES) -> dict[str, IterableDataset]:
    return {task: part.to_iterable_dataset(num_shards=2) for task, part in parts_of(data, sizes).items()}


def figures_of(trainer) -> list[dict[str, float]]:
    return [
        {key: value for key, value in entry.items() if key.startswith("ama/") or key in ("loss", "grad_norm")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


@pytest.fixture
def trained(model_dir, quick_args):
    def train(train_dataset, resume=None, **overrides):
        settings = {
            "mixing_lr": 0.5,
            "max_steps": 7,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
        }
        args = quick_args(**{**settings, **overrides})
        trainer = AMATrainer(model_dir, args=args, train_dataset=train_dataset, peft_config=lora())
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return train


def assert_equal(ours, theirs):
    assert figures_of(ours) == figures_of(theirs)
    for name, value in weights_of(theirs).items():
        assert torch.equal(value, weights_of(ours)[name]), name


# ---- The numbers ----


@pytest.mark.parametrize("mixing", ["ama_s", "ama_r", "uniform"])
def test_streams_train_as_the_same_tasks_in_memory(trained, mixing):
    """The default buffer holds these tasks whole; two passes over the smallest one."""
    data = with_reference_columns(make_dataset(SIZES).cast_column("task", ClassLabel(names=list(SIZES))))
    theirs = trained(data, mixing=mixing)
    ours = trained(streams_of(data.remove_columns("task")), mixing=mixing)
    assert losses_of(ours)[0] != losses_of(ours)[-1]
    assert_equal(ours, theirs)


@pytest.mark.parametrize("has_columns", [True, False])
def test_a_run_resumed_after_any_step_equals_an_undisturbed_one(trained, tmp_path, has_columns):
    """Windows of 5 pairs, so that every resumed run begins in the middle of a pass; saving all along."""
    data = in_memory() if has_columns else make_dataset(SIZES)
    data = data.remove_columns("task")
    settings = {"streaming_buffer": 5, "save_strategy": "steps", "save_steps": 1}
    whole = trained(streams_of(data), output_dir=str(tmp_path / "whole"), **settings)
    probabilities = np.array([logged(whole, f"ama/probability/{task}") for task in SIZES])
    assert (probabilities[:, 0] != probabilities[:, -1]).all()
    for step in range(1, 7) if has_columns else (3,):
        checkpoint = str(tmp_path / "whole" / f"checkpoint-{step}")
        assert_equal(trained(streams_of(data), checkpoint, output_dir=str(tmp_path / "resumed"), **settings), whole)


def test_a_run_is_given_more_steps(trained, tmp_path):
    """The pairs of a stream are not counted, so nothing says that they are others."""
    data, settings = (
        in_memory().remove_columns("task"),
        {"streaming_buffer": 5, "save_strategy": "steps", "save_steps": 7},
    )
    short = trained(streams_of(data), output_dir=str(tmp_path), **settings)
    checkpoint = str(tmp_path / "checkpoint-7")
    longer = trained(streams_of(data), checkpoint, output_dir=str(tmp_path), **{**settings, "max_steps": 9})
    assert longer.state.global_step == 9 and losses_of(longer)[:7] == losses_of(short)


@pytest.mark.parametrize("kwargs", ["{enable", "[1]", "5"])
def test_template_kwargs_that_are_no_mapping_are_named_with_their_row(trained, kwargs):
    data = in_memory().remove_columns("task")
    column = ["{}"] * len(data)
    column[3] = kwargs
    with pytest.raises(
        AMAError, match="Task 'list', row 3 of its stream: chat_template_kwargs is .* Give a mapping like"
    ):
        trained(streams_of(data.add_column("chat_template_kwargs", column)))


def test_a_row_that_is_no_mapping_is_named(trained):
    with pytest.raises(
        AMAError, match="Task 'list', row 0 of its stream is 5, of type int. A row is a mapping with prompt"
    ):
        trained({"list": IterableDataset.from_generator(lambda: iter([5])), "sort": streams_of(in_memory())["sort"]})


def test_training_twice_begins_anew(trained):
    trainer = trained(streams_of(in_memory().remove_columns("task")), streaming_buffer=5)
    assert not np.allclose(trainer.strategy.probabilities(), 1 / 3)
    trainer.train()
    assert logged(trainer, "ama/probability/list")[0] == pytest.approx(1 / 3)


def test_one_stream_of_labelled_tasks_is_read_by_each_task(trained):
    data = make_dataset(SIZES).cast_column("task", ClassLabel(names=list(SIZES)))
    data = with_reference_columns(data).shuffle(seed=3)
    by_task = {
        task: data.filter(lambda row, number: row["task"] == number, fn_kwargs={"number": number}).remove_columns("task")
        for number, task in enumerate(SIZES)
    }  # fmt: skip
    streams = {task: part.to_iterable_dataset() for task, part in by_task.items()}
    assert_equal(trained(data.to_iterable_dataset(), streaming_buffer=5), trained(streams, streaming_buffer=5))


def test_a_task_in_memory_among_streams(trained):
    parts = parts_of(in_memory().remove_columns("task"))
    streams = {**parts, "list": parts["list"].to_iterable_dataset()}
    assert_equal(trained(streams), trained({task: part.to_iterable_dataset() for task, part in parts.items()}))


def test_pairs_that_max_length_drops_are_dropped(trained):
    data = make_dataset(SIZES)
    long = [word.upper() for word in "abcdefghijkl"]
    rows = [{**row, "prompt": [{"role": "user", "content": " ".join(long)}]} for row in make_rows("list", 3, 9)]
    parts = {task: part.remove_columns("task") for task, part in parts_of(data).items()}
    with_long = {**parts, "list": Dataset.from_list([rows[0], *parts["list"], *rows[1:]])}
    ours, theirs = (
        trained({task: part.to_iterable_dataset() for task, part in tasks.items()}, max_length=12, streaming_buffer=6)
        for tasks in (with_long, parts)
    )
    assert_equal(ours, theirs)


def test_what_is_learned(model_dir, quick_args):
    """Worst-case draws from two streams in conflict, without reference losses: both are learned on held-out pairs."""
    sizes = {"sort": 200, "brief": 600}
    trainer = AMATrainer(
        model_dir,
        args=quick_args(
            mixing="ama_s",
            max_steps=60,
            learning_rate=1e-2,
            logging_steps=20,
            per_device_train_batch_size=16,
            streaming_buffer=50,
        ),
        train_dataset=streams_of(make_dataset(sizes).remove_columns("task"), sizes),
        eval_dataset=make_dataset({"sort": 60, "brief": 60}, seed=1),
        peft_config=LoraConfig(r=8, target_modules="all-linear"),
    )
    assert_learns(trainer)


def test_draws_follow_the_lagging_task(trained):
    """One task's specialist is far ahead, the others' are the base."""
    streams = {}
    for task, part in parts_of(make_dataset(SIZES)).items():
        ahead = task == "sort"
        values = {"ref_chosen": -20.0, "ref_rejected": -20.0, "specialist_chosen": -10.0 if ahead else -40.0}
        values["specialist_rejected"] = -30.0 if ahead else -20.0
        for name, value in values.items():
            part = part.add_column(f"{name}_logps", [value] * len(part))
        streams[task] = part.to_iterable_dataset()
    trainer = trained(streams, max_steps=10, learning_rate=1e-5, streaming_buffer=4)
    final = {task: logged(trainer, f"ama/probability/{task}")[-1] for task in SIZES}
    assert max(final, key=final.get) == "sort" and final["sort"] > 0.5, final


def test_losses_in_files_are_streamed(trained, tmp_path):
    """As `trl ama-losses` writes them: texts, ids, log-probs and numbers of tokens, a file per task."""
    streams = {}
    for task, part in parts_of(in_memory()).items():
        counts = {side: [len(row[side][0]["content"].split()) + 1 for row in part] for side in ("chosen", "rejected")}
        for side, values in counts.items():
            part = part.add_column(f"{side}_tokens", np.array(values, dtype=np.int32))
        path = tmp_path / f"{task}.parquet"
        part.add_column("pair_id", [f"{task}-{row}" for row in range(len(part))]).to_parquet(path)
        streams[task] = load_dataset("parquet", data_files=str(path), split="train", streaming=True)
    row = next(iter(streams["list"]))
    assert row["task"] == "list" and "chosen_tokens" in row
    ours = trained(streams, streaming_buffer=5)
    plain = {task: part.remove_columns("task").to_iterable_dataset() for task, part in parts_of(in_memory()).items()}
    assert_equal(ours, trained(plain, streaming_buffer=5))
    assert ours.ref_model is None


def test_workers_are_not_used_and_the_callers_arguments_stay(model_dir, quick_args, caplog):
    args = quick_args(dataloader_num_workers=2, dataloader_persistent_workers=True, dataloader_prefetch_factor=4)
    with caplog.at_level(logging.WARNING):
        trainer = AMATrainer(model_dir, args=args, train_dataset=streams_of(in_memory()), peft_config=lora())
    assert "dataloader_num_workers=2 is taken as 0" in caplog.text
    assert trainer.args.dataloader_num_workers == 0 and args.dataloader_num_workers == 2
    trainer.train()


# ---- What is refused ----


@pytest.fixture
def refuse(model_dir, quick_args):
    """The message with which something is refused, by the constructor or else by training."""

    def refuse(train_dataset, specialists=None, **overrides) -> str:
        with pytest.raises(AMAError) as raised:
            AMATrainer(
                model_dir,
                args=quick_args(**overrides),
                train_dataset=train_dataset,
                peft_config=lora(),
                specialists=specialists,
            ).train()
        text = str(raised.value)
        assert "\n" not in text and len(text) < 600
        return text

    return refuse


def test_what_is_no_dict_of_streams(refuse):
    data = make_dataset(SIZES)
    one = refuse(data.to_iterable_dataset())
    assert "no ClassLabel" in one and "stream.filter(lambda row: row['task'] == 'helpful')" in one
    streams = streams_of(data)
    assert "IterableDatasetDict with the splits ['list', 'sort', 'brief']" in refuse(IterableDatasetDict(streams))
    assert "DatasetDict with the splits" in refuse(DatasetDict(parts_of(data)))
    assert "in memory. Concatenate them" in refuse(parts_of(data))
    assert "maps 'list' to a list, and a task is" in refuse({"list": list(data)})
    assert "has no rows" in refuse({})
    assert "'a/b' cannot be a folder name" in refuse({"a/b": streams["list"]})
    empty = IterableDataset.from_generator(lambda: iter(()))
    assert "Task 'sort' streams no rows" in refuse({**streams, "sort": empty})


def test_streams_that_cannot_be_resumed_or_shared(refuse):
    streams = streams_of(make_dataset(SIZES))
    shuffled = streams["sort"].shuffle(seed=1, buffer_size=4)
    assert "Task 'sort' streams a shuffled dataset" in refuse({**streams, "sort": shuffled})
    assert "Task 'sort' streams a shuffled" in refuse({**streams, "sort": shuffled.map(lambda row: row)})
    share = split_dataset_by_node(streams["sort"], rank=0, world_size=2)
    assert "Task 'sort' streams one process's share" in refuse({**streams, "sort": share})


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"max_steps": -1}, "A stream has no length, so max_steps must say"),
        ({"mixing": "proportional"}, "mixing='proportional' draws in proportion"),
        ({"mixing": "task_normalized"}, "mixing='task_normalized' draws in proportion"),
        ({"mixing": "ama_r", "sampling": "proportional"}, "sampling='proportional' draws in proportion"),
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs goes over all pairs"),
        ({"specialists": dict.fromkeys(SIZES, "MODEL")}, "Specialists score all pairs before training"),
    ],
)
def test_settings_that_need_all_pairs(refuse, model_dir, overrides, said):
    if "specialists" in overrides:
        overrides = {"specialists": dict.fromkeys(SIZES, model_dir)}
    assert said in refuse(streams_of(make_dataset(SIZES)), **overrides)


def changed(row_number, **changes):
    """Streams of which one row of `sort` is another."""
    streams = streams_of(in_memory().remove_columns("task"))

    def change(row, index):
        return changes if index == row_number else {}

    return {**streams, "sort": streams["sort"].map(change, with_indices=True)}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ref_chosen_logps": float("nan")}, "Task 'sort', row 2 of its stream: 'ref_chosen_logps' is missing or not finite (nan)"),
        ({"specialist_chosen_logps": None}, "row 2 of its stream: 'specialist_chosen_logps' is missing or not finite (None)"),
        ({"chosen": None}, "row 2 of its stream has no 'chosen'"),
        ({"chosen": 3}, "row 2 of its stream: chosen is 3, of type int"),
        ({"chosen": "text"}, "mixes two forms"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "row 2 of its stream is plain text, but its first row is messages"),
        ({"task": "list"}, "row 2 of its stream says that it is of task 'list'"),
        ({"chosen_tokens": 99}, "'chosen_tokens' of a pair is 99, and this run's tokenisation has"),
    ],
)  # fmt: skip
def test_rows_that_are_no_pairs_are_named(refuse, changes, said):
    assert said in refuse(changed(2, **changes))


def test_columns_that_do_not_go_together(refuse):
    data = in_memory().remove_columns("task")
    streams = streams_of(data)
    bare = streams_of(make_dataset(SIZES))["sort"]
    assert "Task 'list' streams the column 'ref_chosen_logps', and task 'sort' does not" in refuse(
        {**streams, "sort": bare}
    )
    assert "lacks ['ref_rejected_logps']" in refuse(streams_of(data.remove_columns("ref_rejected_logps")))
    assert "lack 'chosen'" in refuse(streams_of(data.rename_column("chosen", "better")))
    with_images = streams["sort"].map(lambda row: {"images": []})
    assert "Task 'sort' streams images" in refuse({**streams, "sort": with_images})


def test_a_task_that_does_not_fit_at_all(refuse):
    assert "gives no pairs at pass 0, window 0" in refuse(streams_of(make_dataset(SIZES)), max_length=3)


def test_a_buffer_needs_a_pair(quick_args):
    for value in (0, -1, 2.5):
        with pytest.raises(AMAError, match=f"'streaming_buffer' must be .*, got {value}"):
            quick_args(streaming_buffer=value)


def test_the_pipeline_does_not_stream(tmp_path):
    with pytest.raises(AMAError, match="Unknown key 'streaming' in task 'list'.*can be streamed into AMATrainer"):
        TaskConfig.from_entry({"task": "list", "path": "x", "streaming": True})
    (tmp_path / "recipe.yaml").write_text("streaming: true\n")
    parser = make_parser("ama")
    with pytest.raises(AMAError, match="the key 'streaming'.*scores every pair before it trains"):
        check_keys(read_config(["--config", str(tmp_path / "recipe.yaml")]), parser, parser)


def test_truncation_of_one_and_of_many():
    prompts, answers = np.array([3, 9, 30]), np.array([5, 5, 5])
    assert kept_tokens(prompts, answers, 10, "keep_start").tolist() == [5, 1, 0]
    assert kept_tokens(prompts, answers, 4, "keep_end").tolist() == [4, 4, 4]
    assert kept_tokens(9, 5, 10, "keep_start") == 1 and kept_tokens(9, 5, None, "keep_start") == 5
