"""What `DPOTrainer` does not know of: tasks in held-out streams and predictions, losses of a batch, a trainer without arguments."""

import contextlib
import logging

import numpy as np
import pytest
import torch
from accelerate.logging import MultiProcessAdapter
from datasets import ClassLabel, IterableDataset
from dropin import THEIRS, WITH_TASK, World, lora, pairs
from tiny_pairs import make_dataset, with_reference_columns
from tiny_runs import QUICK
from transformers.utils import logging as transformers_logging
from trl import DPOConfig, DPOTrainer

from trl_ama import AMAConfig, AMAError, AMATrainer


SIZES = {"list": 8, "sort": 8}
MPO = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}


@pytest.fixture
def warned(caplog):
    """The text of all warnings, also of those that are said once."""
    MultiProcessAdapter.warning_once.cache_clear()
    transformers_logging.enable_propagation()
    caplog.set_level(logging.WARNING)
    yield lambda: caplog.text
    transformers_logging.disable_propagation()


def by_task(metrics):
    return {key: value for key, value in metrics.items() if "ama/" in key or "worst" in key}


# ---- Held-out pairs ----


@pytest.fixture(scope="module")
def trained(model_dir, tmp_path_factory):
    """A policy that treats the two tasks otherwise."""
    args = AMAConfig(str(tmp_path_factory.mktemp("run")), mixing="uniform", learning_rate=1e-2, max_steps=4, **QUICK)
    trainer = AMATrainer(model_dir, args=args, train_dataset=make_dataset(SIZES), peft_config=lora())
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def figures(trained):
    """Of held-out pairs in memory."""
    found = by_task(trained.evaluate(make_dataset(SIZES, seed=1)))
    assert found["eval_ama/margin/list"] != pytest.approx(found["eval_ama/margin/sort"], abs=1e-3)
    return found


STREAMS = {
    "names": lambda data: data.to_iterable_dataset(),
    "names, types unknown": lambda data: IterableDataset.from_generator(lambda: iter(data.to_list())),
    "labels in another order": lambda data: data.cast_column(
        "task", ClassLabel(names=["sort", "list"])
    ).to_iterable_dataset(),
    "labels with another task": lambda data: data.cast_column(
        "task", ClassLabel(names=["brief", "sort", "list"])
    ).to_iterable_dataset(),
    "in a dict": lambda data: data.to_iterable_dataset(),
}


@pytest.mark.parametrize("kind", STREAMS)
def test_a_held_out_stream_has_the_figures_of_its_pairs_in_memory(trained, figures, kind):
    stream = STREAMS[kind](make_dataset(SIZES, seed=1))
    metrics = trained.evaluate({"x": stream}) if kind == "in a dict" else trained.evaluate(stream)
    assert {key.replace("eval_x_", "eval_"): value for key, value in by_task(metrics).items()} == pytest.approx(
        figures
    )


def test_predictions_have_figures_by_task(trained, figures):
    new = make_dataset(SIZES, seed=1)
    numbered = new.cast_column("task", ClassLabel(names=["sort", "list"]))
    for data in (new, numbered, new.to_iterable_dataset()):
        output = trained.predict(data)
        found = {key.replace("test_", "eval_"): value for key, value in by_task(output.metrics).items()}
        assert found == pytest.approx(figures)
        assert len(output.predictions) == 2 * len(new)


@pytest.mark.parametrize(
    ("task", "says"),
    [("sorts", "task 'sorts', which is not among the training tasks"), (None, "has an empty 'task'")],
)
def test_a_row_of_a_stream_is_named(trained, task, says):
    data = make_dataset({"list": 4}, labelled=False).add_column("task", ["list"] * 3 + [task])
    with pytest.raises(AMAError, match=f"Row 3 of eval_dataset.*{says}"):
        trained.evaluate(data.to_iterable_dataset())


def test_a_held_out_stream_without_the_reference_that_the_training_pairs_carry(model_dir, quick_args):
    held_out = make_dataset(SIZES).to_iterable_dataset()
    with pytest.raises(AMAError, match="'eval' are streamed and lack.*ref_chosen_logps"):
        AMATrainer(
            model_dir,
            args=quick_args(mixing="uniform"),
            train_dataset=with_reference_columns(make_dataset(SIZES)),
            eval_dataset=held_out,
        )


# ---- Losses of a batch ----


@pytest.mark.parametrize("settings", [MPO, {"loss_type": ["aot"]}], ids=["MPO", "aot"])
def test_uniform_descends_trls_loss_of_the_batch(model_dir, tokenizer, tmp_path, settings):
    """Of the very batches that it draws, by DPOTrainer."""
    theirs = World(THEIRS, model_dir, tmp_path / "theirs", tokenizer).trainer(settings=settings, model=model_dir)
    world = World(WITH_TASK, model_dir, tmp_path / "ours", tokenizer)
    args = world.args(mixing="uniform", max_steps=1, **settings)
    ours = AMATrainer(model_dir, args=args, train_dataset=make_dataset(SIZES))
    batch = next(iter(ours.get_train_dataloader()))
    assert sorted(batch.pop("task").tolist()) == [0, 0, 1, 1]
    expected = theirs.compute_loss(theirs.model, theirs._prepare_inputs(batch)).item()
    ours = AMATrainer(model_dir, args=args, train_dataset=make_dataset(SIZES))
    ours.train()
    entry = ours.state.log_history[0]
    assert entry["loss"] == pytest.approx(expected, abs=1e-6)
    # What a pair has of it: the other parts, alike for both tasks before the first step; nothing of `aot`
    own = 0.8 * np.log(2) + 0.2 * 2 * np.log(2)
    if settings is MPO:
        assert entry["ama/loss/list"] == pytest.approx(own, abs=1e-6) == entry["ama/loss/sort"]
    else:
        assert "ama/loss/list" not in entry
    assert entry["ama/probability/list"] == 0.5


@pytest.mark.parametrize("mixing", ["ama_s", "ama_r", "task_normalized"])
def test_where_pairs_are_weighed_they_need_losses_of_their_own(quick_args, mixing):
    with pytest.raises(AMAError, match="'sft' has no per-pair meaning.*mixing='proportional' or 'uniform'"):
        quick_args(mixing=mixing, **MPO)


def test_so_does_excess(model_dir, quick_args):
    with pytest.raises(AMAError, match="'sft' has no per-pair meaning"):
        quick_args(mixing="uniform", specialists={"list": "a", "sort": "b"}, **MPO)
    with pytest.raises(AMAError, match="'sft' has no per-pair meaning"):
        AMATrainer(
            model_dir,
            args=quick_args(mixing="uniform", **MPO),
            train_dataset=with_reference_columns(make_dataset(SIZES)),
        )


# ---- Without arguments, without tasks ----


@pytest.fixture
def no_arguments(monkeypatch, tmp_path):
    """Configs made without arguments run on a CPU, for a few steps, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    for cls in (DPOConfig, AMAConfig):
        original = cls.__post_init__

        def quick(self, original=original):
            self.use_cpu, self.bf16, self.max_steps, self.report_to = True, False, 2, "none"
            self.logging_steps, self.save_strategy, self.disable_tqdm = 1, "no", True
            original(self)

        monkeypatch.setattr(cls, "__post_init__", quick)


@pytest.mark.parametrize("named", [True, False])
def test_a_model_and_pairs_of_one_task_are_enough(no_arguments, model_dir, warned, named):
    theirs = DPOTrainer(model_dir, train_dataset=pairs(20))
    theirs.train()
    ours = AMATrainer(model_dir, train_dataset=make_dataset({"list": 20}, labelled=named))
    ours.prefix_sharing.mode = False
    ours.train()
    assert ours.args.mixing == "proportional"
    assert [entry.get("loss") for entry in ours.state.log_history] == [
        entry.get("loss") for entry in theirs.state.log_history
    ]
    for name, value in theirs.model.named_parameters():
        assert torch.equal(ours.model.get_parameter(name), value), name
    assert "There is one task and no `args`, so AMATrainer trains as DPOTrainer does" in warned()


def test_several_tasks_without_arguments_are_balanced(no_arguments, model_dir):
    assert AMATrainer(model_dir, train_dataset=make_dataset(SIZES)).args.mixing == "ama_s"


def test_a_stream_whose_tasks_cannot_be_known(model_dir, quick_args):
    with pytest.raises(AMAError, match=r"no ClassLabel.*cast_column.*remove_columns\('task'\)"):
        AMATrainer(
            model_dir, args=quick_args(mixing="proportional"), train_dataset=make_dataset(SIZES).to_iterable_dataset()
        )


def test_a_stream_of_no_pairs(model_dir, quick_args):
    for rows, says in (([], "streams no rows"), ([{"prompt": "a", "chosen": "b"}], "which lack 'rejected'")):
        with pytest.raises(AMAError, match=says):
            AMATrainer(
                model_dir,
                args=quick_args(mixing="proportional"),
                train_dataset=IterableDataset.from_generator(lambda rows=rows: iter(rows)),
            )


def test_a_stream_as_it_comes_has_figures_by_task(model_dir, quick_args):
    stream = make_dataset(SIZES).cast_column("task", ClassLabel(names=["sort", "list"])).to_iterable_dataset()
    trainer = AMATrainer(
        model_dir, args=quick_args(mixing="proportional", per_device_train_batch_size=4), train_dataset=stream
    )
    trainer.train()
    first, *_, last = trainer.state.log_history[:-1]
    assert "ama/loss/list" in first and "ama/loss/sort" not in first  # the first eight pairs
    assert "ama/loss/sort" in last and not any("probability" in key for key in last)  # which nobody knows


def test_a_batch_without_tasks_is_an_error_where_they_count(model_dir, quick_args, monkeypatch):
    trainer = AMATrainer(model_dir, args=quick_args(mixing="ama_s"), train_dataset=make_dataset(SIZES))
    monkeypatch.setattr(trainer, "_collating_tasks", contextlib.nullcontext)
    with pytest.raises(AMAError, match="The training batches have no 'task', by which mixing='ama_s' weighs pairs"):
        trainer.train()


# ---- Processes ----


@pytest.mark.parametrize("asked", [True, False])
def test_one_process_where_several_were_asked_for(model_dir, quick_args, monkeypatch, warned, asked):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1") if asked else monkeypatch.delenv("MASTER_ADDR", raising=False)
    AMATrainer(model_dir, args=quick_args(mixing="uniform"), train_dataset=make_dataset(SIZES))
    assert ("was asked for several processes and has started one" in warned()) is asked
