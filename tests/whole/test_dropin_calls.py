"""What users do with a `DPOTrainer` beside training: the same comes of it with an `AMATrainer`."""

import inspect
import logging

import pytest
from datasets import DatasetDict
from dropin import TASK, THEIRS, WITH_TASK, WITHOUT_TASK, World, comparable, lora, outcome, pairs, run_both_fixture  # noqa: F401 - a fixture
from tiny_pairs import make_dataset
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging
from trl import DPOTrainer

from trl_ama import AMATrainer


pytestmark = pytest.mark.trains


def held_out(count=6, seed=1):
    return pairs(count, seed=seed)


def given(world, data):
    """Pairs for a call, as the world's pair of classes takes them."""
    return world.pair.prepare(data)


# ---- Calls ----

CALLS = {}


def call(scenario):
    CALLS[scenario.__name__] = scenario
    return scenario


@call
def evaluates_new_pairs(world):
    trainer = world.trainer()
    trainer.train()
    return trainer.evaluate(given(world, held_out()))


@call
def evaluates_many(world):
    trainer = world.trainer(held_out={"a": held_out(3), "b": held_out(4)})
    first = trainer.evaluate()
    named = trainer.evaluate("b", metric_key_prefix="eval_b")
    more = trainer.evaluate(given(world, DatasetDict(c=held_out(5), d=held_out(3, 2))), metric_key_prefix="test")
    streamed = trainer.evaluate(given(world, held_out(5).to_iterable_dataset()))
    return [comparable(figures) for figures in (first, named, more, streamed)]


@call
def evaluates_with_precomputed_reference(world):
    trainer = world.trainer(settings={"precompute_ref_log_probs": True}, held_out=held_out(4))
    before = trainer.evaluate(given(world, held_out()))
    trainer.train()
    with pytest.raises(ValueError, match="Cannot compute reference log-probs for a dataset passed to"):
        trainer.evaluate(given(world, held_out()))
    return [comparable(before), comparable(trainer.evaluate())]


@call
def streams_no_precomputed_reference(world):
    stream = held_out().to_iterable_dataset()
    trainer = world.trainer(settings={"precompute_ref_log_probs": True})
    for data in (stream, {"a": stream}):
        with pytest.raises(ValueError, match="precompute_ref_log_probs.*not supported with IterableDataset"):
            trainer.evaluate(given(world, data))
        with pytest.raises(ValueError, match="precompute_ref_log_probs.*not supported with IterableDataset"):
            world.trainer(settings={"precompute_ref_log_probs": True}, held_out=data)
    return None


@call
def predicts(world):
    trainer = world.trainer(held_out=held_out(3))
    output = trainer.predict(trainer.eval_dataset)
    return [output.predictions, output.label_ids, comparable(output.metrics)]


@call
def trains_twice(world):
    trainer = world.trainer()
    trainer.train()
    trainer.train()


@call
def saves(world):
    trainer = world.trainer(peft_config=lora())
    trainer.train()
    trainer.save_model(str(world.folder / "model"))
    trainer.save_state()
    trainer.log_metrics("train", {"train_loss": 1.0})
    trainer.save_metrics("train", {"train_loss": 1.0})
    trainer.log({"mine": 1.0})
    trainer.create_model_card()
    return trainer.get_num_trainable_parameters(), len(trainer.get_train_dataloader()), trainer.is_world_process_zero()


class Mine(TrainerCallback):
    pass


@call
def manages_callbacks(world):
    trainer = world.trainer()
    trainer.add_callback(Mine)
    taken = trainer.pop_callback(Mine)
    trainer.add_callback(taken)
    trainer.remove_callback(taken)
    trainer.train()
    return type(taken).__name__, any(isinstance(one, Mine) for one in trainer.callback_handler.callbacks)


@call
def resumes(world):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    world.trainer(settings={**settings, "max_steps": 2}).train()
    world.trainer(settings=settings).train(resume_from_checkpoint=True)


@call
def resumes_a_stream(world):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    world.trainer(pairs().to_iterable_dataset(), settings={**settings, "max_steps": 2}).train()
    world.trainer(pairs().to_iterable_dataset(), settings=settings).train(resume_from_checkpoint=True)


@call
def resumes_with_another_batch_size(world):
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 8}
    world.trainer(settings={**settings, "max_steps": 3}).train()
    trainer = world.trainer(settings={**settings, "per_device_train_batch_size": 2})
    trainer.train(resume_from_checkpoint=str(world.folder / "run" / "checkpoint-3"))


@call
def resumes_with_more_pairs(world):
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 8}
    world.trainer(settings={**settings, "max_steps": 3}).train()
    world.trainer(pairs(28), settings={**settings, "data_seed": 3}).train(resume_from_checkpoint=True)


@call
def searches_no_hyperparameters(world):
    trainer = world.trainer()
    with pytest.raises(RuntimeError, match="model_init|backend"):
        trainer.hyperparameter_search()
    trainer.train()


# What DPOTrainer begins anew when it is resumed, and ours goes on with
FORGOTTEN = frozenset({"num_tokens", "train_loss"})


def forgotten(name):
    return FORGOTTEN if name.startswith("resumes") else frozenset()


@pytest.mark.parametrize("name", CALLS)
def test_a_call_does_what_dpo_trainers_does(run_both, name):
    run_both(CALLS[name], WITH_TASK, forgotten(name))


@pytest.mark.parametrize("name", ["evaluates_many", "predicts", "resumes_with_more_pairs"])
def test_also_for_pairs_without_tasks(run_both, name):
    run_both(CALLS[name], WITHOUT_TASK, forgotten(name))


# ---- Attributes ----


@pytest.fixture(scope="module")
def trained(model_dir, tokenizer, tmp_path_factory):
    """Both trainers after the same short run."""

    def scenario(world):
        world.trainer(held_out=held_out(4)).train()

    return [
        outcome(World(pair, model_dir, tmp_path_factory.mktemp("run"), tokenizer), scenario).trainer
        for pair in (WITH_TASK, THEIRS)
    ]


def test_every_attribute_is_there_and_of_its_kind(trained):
    ours, theirs = trained
    lacking = [name for name in dir(theirs) if not name.startswith("__") and not hasattr(ours, name)]
    assert lacking == []
    other = {
        name: (type(getattr(ours, name)).__name__, type(value).__name__)
        for name, value in vars(theirs).items()
        if not isinstance(getattr(ours, name), type(value))
    }
    assert other == {}


def test_every_method_takes_what_dpo_trainers_takes():
    for name, method in inspect.getmembers(DPOTrainer, inspect.isfunction):
        if name.startswith("_") or getattr(AMATrainer, name) is method:
            continue
        theirs = inspect.signature(method).parameters
        ours = inspect.signature(getattr(AMATrainer, name)).parameters
        takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in ours.values())
        assert takes_all or [one for one in theirs if one not in ours] == [], name


def test_the_batches_are_dpo_trainers_with_the_task(trained):
    ours, theirs = (next(iter(trainer.get_train_dataloader())) for trainer in trained)
    assert ours.pop("task").tolist() == [0] * 4
    assert list(ours) == list(theirs)
    assert all(ours[name].equal(value) for name, value in theirs.items())


# ---- What is said ----


def test_a_resumed_run_says_what_differs(model_dir, tokenizer, tmp_path, caplog):
    transformers_logging.enable_propagation()
    caplog.set_level(logging.WARNING)
    try:
        resumes_with_another_batch_size(World(WITH_TASK, model_dir, tmp_path, tokenizer))
    finally:
        transformers_logging.disable_propagation()
    assert "written with pairs per optimizer step 4, this run has 2" in caplog.text
    assert "as with DPOTrainer, some pairs of this epoch may be trained on twice" in caplog.text


def test_pairs_with_new_tasks_go_on_with_a_fixed_mixture(model_dir, tokenizer, tmp_path):
    world = World(WITH_TASK, model_dir, tmp_path, tokenizer)
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 5}
    world.trainer(settings={**settings, "max_steps": 3}).train()
    two = make_dataset({TASK: 12, "sort": 12})
    trainer = AMATrainer(model_dir, args=world.args(**settings), train_dataset=two)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 5
    assert trainer.state.log_history[-2]["ama/probability/sort"] == 0.5
