"""`AMATrainer` in the place of `DPOTrainer`: the same run, for everything that people switch on.

A row of a table is a name and what a user does; adding a report is one line.
"""

import pytest
import torch
from datasets import DatasetDict, IterableDataset, IterableDatasetDict
from dropin import WITH_TASK, WITHOUT_TASK, lora, pairs, run_both_fixture  # noqa: F401 - a fixture
from tiny_pairs import make_dataset
from transformers import EarlyStoppingCallback, TrainerCallback
from trl.trainer.dpo_trainer import DataCollatorForPreference


pytestmark = pytest.mark.trains


def training(train=None, held_out=None, kwargs=None, evaluates=False, **settings):
    """Train, then evaluate if asked to."""

    def scenario(world):
        more = {name: value(world) for name, value in (kwargs or {}).items()}
        make = [data() if callable(data) else data for data in (train, held_out)]
        trainer = world.trainer(*make, settings=settings, **more)
        trainer.train()
        return trainer.evaluate() if evaluates else None

    return scenario


def held_out(count=6):
    return pairs(count, seed=1)


def streamed(count=20, seed=0):
    return pairs(count, seed=seed).to_iterable_dataset()


def plain_text():
    """Pairs of strings, some without a difference before the last word."""
    rows = make_dataset({"list": 20}, labelled=False)
    return rows.map(
        lambda row: {
            "prompt": row["prompt"][0]["content"],
            "chosen": " " + row["chosen"][0]["content"],
            "rejected": " " + row["rejected"][0]["content"],
        }
    )


def implicit():
    """Pairs whose prompt is the answers' beginning."""
    return make_dataset({"list": 20}, labelled=False).map(
        lambda row: {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]},
        remove_columns="prompt",
    )


def own_optimizer(world):
    # For a model that the trainer is given
    world.own = world.model()
    optimizer = torch.optim.SGD(world.own.parameters(), lr=0.1, momentum=0.5)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)


class StopAfterSeven(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 7


class EvaluateAtEpochEnd(TrainerCallback):
    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_evaluate = control.should_log = True


class Reversed(DataCollatorForPreference):
    """A user's own, with an attribute of its own."""

    seen = 0

    def torch_call(self, examples):
        self.seen += 1
        assert all("prompt_ids" in example for example in examples)
        return super().torch_call(examples[::-1])


def own_collator(world):
    return Reversed(pad_token_id=world.tokenizer.pad_token_id, max_length=32)


def keep_lengths(logits, labels):
    return logits.argmax(dim=-1)


def count_tokens(prediction):
    return {"ones": float((prediction.predictions == 1).sum()), "labels": float((prediction.label_ids == 1).sum())}


# What only changes numbers, tests/support/corpus_settings.py has
STEPS = {"eval_strategy": "steps", "eval_steps": 2}
SAVES = {"save_strategy": "steps", "save_steps": 2}
EPOCHS = {"max_steps": -1, "num_train_epochs": 2}
RUNS = {
    "full": training(),
    "accumulation, uneven end": training(**EPOCHS, gradient_accumulation_steps=3, logging_first_step=True, logging_steps=2),
    "lora": training(kwargs={"peft_config": lambda world: lora(use_dora=True)}, gradient_checkpointing=True, optim="adafactor", warmup_steps=2),
    "PeftModel object": training(kwargs={"model": lambda world: world.lora_model()}, train_sampling_strategy="sequential"),
    "objects": training(kwargs={"optimizers": own_optimizer, "model": lambda world: world.own, "ref_model": lambda world: world.model(initializer_range=0.1)}),
    "precomputed reference": training(held_out=held_out, evaluates=True, precompute_ref_log_probs=True, data_seed=11),
    "sync_ref_model, drop_last": training(**EPOCHS, sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=0.5, per_device_train_batch_size=8, dataloader_drop_last=True),
    "evaluation on start, delayed": training(held_out=lambda: {"a": held_out(3), "b": streamed(5, 1)}, **STEPS, eval_delay=2, eval_on_start=True, evaluates=True),
    "held-out DatasetDict": training(held_out=lambda: DatasetDict(a=held_out(3), b=held_out(5)), evaluates=True, max_steps=1),
    "held-out streams": training(held_out=lambda: IterableDatasetDict(a=streamed(3, 1), b=streamed(5, 2)), **STEPS),
    "saves by steps at an epoch's end": training(save_strategy="steps", save_steps=5, save_total_limit=1, max_steps=10, save_only_model=True),
    "saves and evaluates by steps": training(held_out=held_out, **SAVES, **STEPS, max_steps=6, load_best_model_at_end=True, metric_for_best_model="eval_rewards/margins", greater_is_better=True),
    "saves by epoch": training(held_out=held_out, **EPOCHS, save_strategy="epoch", eval_strategy="epoch", logging_strategy="epoch", load_best_model_at_end=True),
    "saves the best": training(held_out=held_out, save_strategy="best", eval_strategy="steps", eval_steps=1, metric_for_best_model="loss"),
    "compute_metrics": training(held_out=held_out, evaluates=True, kwargs={"compute_metrics": lambda world: count_tokens}, max_steps=1),
    "callbacks": training(held_out=held_out, kwargs={"callbacks": lambda world: [EvaluateAtEpochEnd(), StopAfterSeven()]}, max_steps=20),
    "early stopping": training(held_out=held_out, kwargs={"callbacks": lambda world: [EarlyStoppingCallback(1)]}, **SAVES, **STEPS, load_best_model_at_end=True, learning_rate=0.3, max_steps=8),
    "own collator": training(held_out=held_out, kwargs={"data_collator": own_collator}, evaluates=True, max_steps=1),
    "own collator, all columns": training(lambda: pairs(20, note="x"), kwargs={"data_collator": own_collator}, remove_unused_columns=False),
    "further columns": training(lambda: pairs(20, note="x", score=0.5, chat_template_kwargs={"loud": True}, tools="[]"), include_num_input_tokens_seen="all"),
    "plain text": training(plain_text, held_out=plain_text, evaluates=True, max_steps=1),
    "implicit prompts, cut": training(implicit, max_length=8, truncation_mode="keep_end"),
    "WPO": training(use_weighting=True),
    "MPO": training(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0], held_out=held_out, evaluates=True),
    "aot": training(loss_type="aot", held_out=held_out, evaluates=True),
    "aot_unpaired": training(loss_type="aot_unpaired", label_smoothing=0.1),
    "stream that ends": training(lambda: streamed(10), max_steps=6),
    "stream, held-out stream": training(streamed, held_out=lambda: streamed(6, 1), **STEPS, evaluates=True),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_dpo_trainers(run_both, name):
    ours, theirs = run_both(RUNS[name], WITH_TASK)
    assert any("loss" in entry for entry in theirs.log)
    assert type(ours.trainer.data_collator) is type(theirs.trainer.data_collator)


UNKNOWN = training(lambda: IterableDataset.from_generator(lambda: iter(pairs().to_list())))


@pytest.mark.parametrize(
    "name", ["types unknown", "own collator", "MPO", "stream, held-out stream", "accumulation, uneven end"]
)
def test_so_is_one_of_pairs_without_tasks(run_both, name):
    ours, theirs = run_both({**RUNS, "types unknown": UNKNOWN}[name], WITHOUT_TASK)
    # Then nothing of ours is logged either
    assert [set(entry) for entry in ours.trainer.state.log_history] == [
        set(entry) for entry in theirs.trainer.state.log_history
    ]
