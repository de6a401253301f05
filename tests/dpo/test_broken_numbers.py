"""NaN, infinity, nothing to learn: what a run does with each, and what it says."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from tiny_models import lora, make_model
from tiny_pairs import make_dataset, make_rows, with_reference_columns
from tiny_runs import logged, losses_of, weights_of
from transformers import TrainerCallback

from trl_ama import AMAError, AMATrainer
from trl_ama.dpo.pair_trainer import SpecialistTrainer
from trl_ama.metrics import worst_and_mean
from trl_ama.mixing import STRATEGIES, build_strategy
from trl_ama.mixing.monitor import MixtureMonitor
from trl_ama.sampling.mixture import Mixture
from trl_ama.sampling.step_recorder import StepRecorder
from trl_ama.training.stage import TrainingStage


PROCESS = SimpleNamespace(num_processes=1)
HALVES = np.full(2, 0.5)


# ---- Sums of a step, and the mixture ----


def recorder_with(losses, excess, tasks=(0, 0, 1, 1)) -> StepRecorder:
    recorder = StepRecorder(2)
    recorder.add(torch.tensor(tasks), torch.tensor(losses), torch.tensor(excess), torch.tensor(excess))
    return recorder


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_pairs_that_are_not_finite_are_counted_and_in_no_sum(bad):
    step = recorder_with([1.0, bad, 2.0, 4.0], [0.5, bad, 1.0, 0.0]).finish(HALVES, PROCESS)
    np.testing.assert_array_equal(step.counts, [2, 2])
    np.testing.assert_array_equal(step.broken_counts, [1, 0])
    np.testing.assert_array_equal(step.loss_sums, [1.0, 6.0])
    np.testing.assert_array_equal(step.mean_excess(), [0.5, 0.5])


def test_a_finite_loss_with_a_broken_excess_is_broken_too():
    step = recorder_with([1.0, 1.0, 1.0, 1.0], [0.5, 0.5, 0.5, math.nan]).finish(HALVES, PROCESS)
    np.testing.assert_array_equal(step.broken_counts, [0, 1])
    np.testing.assert_array_equal(step.loss_sums, [2.0, 1.0])


def of_two_processes(theirs: np.ndarray) -> SimpleNamespace:
    """An accelerator whose other process has these sums."""
    other = torch.from_numpy(theirs.reshape(-1).view(np.uint8))
    return SimpleNamespace(num_processes=2, device="cpu", gather=lambda own: torch.cat([own, other]))


def test_finite_losses_have_a_sum_over_processes():
    theirs = recorder_with([3e38, 1.0, 1.0, 1.0], [3e38, 1.0, 1.0, 1.0])._sums()
    step = recorder_with([3e38, 1.0, 1.0, 1.0], [3e38, 1.0, 1.0, 1.0]).finish(HALVES, of_two_processes(theirs))
    np.testing.assert_array_equal(step.broken_counts, [0, 0])
    np.testing.assert_allclose(step.excess_sums, [6e38, 4.0])  # more than float32 holds


@pytest.mark.parametrize("tasks", [(0, 0, 0, 0), ()])
def test_a_rank_without_pairs_of_a_task_or_without_any(tasks):
    """What both ranks get is what one process with all the pairs gets."""
    ours = recorder_with([1.0] * len(tasks), [0.5] * len(tasks), tasks) if tasks else StepRecorder(2)
    theirs = recorder_with([2.0] * 4, [1.0, 1.0, 0.0, 0.0], (1, 1, 1, 1))._sums()
    step = ours.finish(HALVES, of_two_processes(theirs))
    np.testing.assert_array_equal(step.counts, [len(tasks), 4])
    np.testing.assert_array_equal(step.loss_sums, [len(tasks), 8.0])
    np.testing.assert_array_equal(step.excess_sums, [len(tasks) / 2, 2.0])
    assert not step.broken_counts.any()


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_broken_step_leaves_the_mixture_as_it_was(name):
    strategy = build_strategy(name, [10, 30], mixing_lr=1.0)
    mixture = Mixture(strategy, ["list", "sort"], 0.7)
    mixture.begin(100)
    good = [1.0, 1.0, 2.0, 2.0], [0.0, 0.5, 2.0, 2.0]
    mixture.recorder = recorder_with(*good)
    mixture.finish_step(PROCESS)
    before = strategy.state_dict()
    mixture.recorder = recorder_with([1.0, math.nan, 9.0, 9.0], [0.5, math.nan, 9.0, 9.0])
    figures, _ = mixture.finish_step(PROCESS)
    assert strategy.state_dict() == before and mixture.broken_pairs == {"list": 1} and mixture.step_pairs == 4
    assert figures["ama/loss/list"] == 1.0 and all(math.isfinite(value) for value in figures.values())
    mixture.recorder = recorder_with(*good)
    mixture.finish_step(PROCESS)
    assert mixture.broken_pairs == {}
    assert (strategy.state_dict() != before) == name.startswith("ama")  # it goes on
    json.dumps(mixture.state_dict(), allow_nan=False)


@pytest.mark.parametrize("name", ["ama_r", "ama_s"])
def test_a_step_size_that_overflows_is_refused_and_the_state_stays_finite(name):
    strategy = build_strategy(name, [1, 1], mixing_lr=1e308)
    mixture = Mixture(strategy, ["list", "sort"], 0.7)
    mixture.begin(10)
    mixture.recorder = recorder_with([1.0] * 4, [100.0, 100.0, 1.0, 1.0])
    with pytest.raises(AMAError, match="mixing_lr=1e.308 times .* overflows. Lower mixing_lr"):
        mixture.finish_step(PROCESS)
    np.testing.assert_array_equal(strategy.probabilities(), HALVES)


# ---- Steps of a trainer ----


class Watch(TrainerCallback):
    """Weights, an optimizer's moment and the mixture before and after each step."""

    def __init__(self):
        self.trainer, self.kept, self.before = None, [], None

    def look(self):
        moments = [state["exp_avg"].clone() for state in self.trainer.optimizer.state.values()]
        return weights_of(self.trainer), moments, json.dumps(self.trainer.strategy.state_dict(), allow_nan=False)

    def on_step_begin(self, args, state, control, **kwargs):
        self.before = self.look()

    def on_step_end(self, args, state, control, **kwargs):
        weights, moments, mixture = self.look()
        same = all(torch.equal(value, self.before[0][name]) for name, value in weights.items())
        same_moments = len(moments) == len(self.before[1]) and all(map(torch.equal, moments, self.before[1]))
        self.kept.append((same, same_moments, mixture == self.before[2]))


def with_one_poisoned_pair(tokenizer, is_tied=False):
    """A model in which the word `mango` is NaN, and pairs of two tasks of which one, of `sort`, has that word."""
    model = make_model(len(tokenizer), tie_word_embeddings=is_tied)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("mango")] = math.nan
    rows = {
        task: [row for row in make_rows(task, 60, seed=0) if "mango" not in row["prompt"][0]["content"]]
        for task in ("list", "sort")
    }
    poisoned = next(row for row in make_rows("sort", 60, seed=0) if "mango" in row["prompt"][0]["content"])
    rows = [
        *({**row, "task": "list"} for row in rows["list"][:20]),
        *({**row, "task": "sort"} for row in [*rows["sort"][:19], poisoned]),
    ]
    return model, with_reference_columns(Dataset.from_list(rows))


@pytest.mark.parametrize("prefix_sharing", [False, "auto"])
@pytest.mark.parametrize("mixing", ["ama_s", "ama_r", "proportional"])
def test_one_pair_that_is_nan(tokenizer, quick_args, caplog, mixing, prefix_sharing):
    model, data = with_one_poisoned_pair(tokenizer)
    watch = Watch()
    trainer = AMATrainer(
        model,
        args=quick_args(mixing=mixing, mixing_lr=1.0, max_steps=12, weight_decay=0.1, prefix_sharing=prefix_sharing),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=lora(),
        callbacks=[watch],
    )
    watch.trainer = trainer
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "ama/loss/list" in entry or "ama/loss/sort" in entry]
    broken = [index for index, entry in enumerate(entries) if "ama/not_finite/sort" in entry]
    assert len(entries) == 12 and 1 <= len(broken) <= 4
    for index, kept in enumerate(watch.kept):
        moves_mixture = mixing != "proportional" and index not in broken
        assert kept == (index in broken, index in broken, not moves_mixture), index
    for index in broken:
        assert entries[index]["ama/not_finite/sort"] == 1.0 and math.isnan(entries[index]["grad_norm"])
    # One bad pair is not a diverged policy: named by its task alone, also where it shares a row with others
    assert not any("ama/not_finite/list" in entry for entry in entries)
    assert all(math.isfinite(value) for entry in entries for key, value in entry.items() if key.startswith("ama/"))
    assert all(math.isfinite(loss) for loss in losses_of(trainer))  # logging_nan_inf_filter
    text = next(record.message for record in caplog.records if "left as it was" in record.message)
    assert f"step {broken[0] + 1} had pairs without a finite loss (1 of task 'sort')" in text
    assert "lower learning_rate (it is 0.001), or look at the pairs of task 'sort' with `trl ama-check`" in text


def test_a_gradient_that_is_not_finite_though_the_losses_are(model_dir, quick_args, caplog):
    watch = Watch()
    trainer = AMATrainer(
        model_dir,
        args=quick_args(max_steps=4, mixing_lr=1.0, logging_nan_inf_filter=False),
        train_dataset=with_reference_columns(make_dataset({"list": 20, "sort": 20})),
        peft_config=lora(),
        callbacks=[watch],
    )
    watch.trainer = trainer
    weight = next(parameter for parameter in trainer.model.parameters() if parameter.requires_grad)
    weight.register_hook(lambda grad: grad * math.inf if trainer.state.global_step == 1 else grad)
    trainer.train()
    # The losses are good, so the mixture moves; the policy does not
    assert watch.kept == [(False, False, False), (True, True, False), (False, False, False), (False, False, False)]
    assert "step 2 had a gradient that is not finite, so the policy was left as it was" in caplog.text


class Diverge(TrainerCallback):
    """Puts a value into the weights after three steps, as an optimizer step may."""

    def __init__(self, value):
        self.value = value

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 3:
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.data.fill_(self.value)


def diverging(model_dir, quick_args, value, **overrides):
    return AMATrainer(
        model_dir,
        args=quick_args(save_strategy="steps", save_steps=1, save_total_limit=2, **{"max_steps": 20, **overrides}),
        train_dataset=with_reference_columns(make_dataset({"list": 20, "sort": 20})),
        peft_config=lora(),
        callbacks=[Diverge(value)],
    )


@pytest.mark.parametrize(
    ("value", "kept", "left"),
    [
        (math.inf, [1, 2], "is from before and intact"),
        (3e38, [2, 3], "may be broken already: delete it before you resume"),  # finite weights, but no finite loss
    ],
)
def test_a_policy_that_diverges_ends_the_run(model_dir, quick_args, caplog, value, kept, left):
    trainer = diverging(model_dir, quick_args, value)
    with pytest.raises(AMAError) as caught:
        trainer.train()
    text = str(caught.value)
    assert trainer.state.global_step == 7  # steps 4 to 8
    assert "The policy has diverged: pairs without a finite loss (" in text and "in 5 optimizer steps in a row" in text
    assert "of task 'list'" in text and "of task 'sort'" in text and "lower learning_rate (it is 0.001)" in text
    assert f"checkpoint-{kept[-1]}', {left}" in text and "\n" not in text
    folder = Path(trainer.args.output_dir)
    folders = sorted(path.name for path in folder.glob("checkpoint-*"))
    assert folders == [f"checkpoint-{step}" for step in kept]
    assert "no checkpoint is written at step 4" in caplog.text
    state = json.loads((folder / folders[0] / "trainer_state.json").read_text())
    json.dumps(state["stateful_callbacks"]["ama"], allow_nan=False)
    json.dumps(trainer.mixture.state_dict(), allow_nan=False)


def test_a_policy_that_diverges_in_its_last_steps_is_not_handed_over(model_dir, quick_args):
    with pytest.raises(AMAError, match="has diverged: .* at the end of the run"):
        diverging(model_dir, quick_args, 3e38, max_steps=5).train()


def test_a_specialist_that_diverges_is_not_done(model_dir, quick_args, tmp_path):
    from trl import DPOConfig

    stage = TrainingStage(tmp_path / "sort", "The specialist of task 'sort'", {"seed": 1})
    trainer = SpecialistTrainer(
        model=model_dir,
        args=quick_args(DPOConfig, output_dir=str(stage.folder), max_steps=20, save_strategy="steps", save_steps=2),
        train_dataset=make_dataset({"sort": 20}).remove_columns("task"),
        peft_config=lora(),
        callbacks=[Diverge(3e38)],
    )
    trainer.what = stage.what
    with pytest.raises(
        AMAError, match="The specialist of task 'sort' has diverged: .*'.*checkpoint-2', is from before"
    ):
        stage.train(trainer)
    assert stage.result is None and not (stage.folder / "adapter_model.safetensors").exists()


def test_an_evaluation_without_numbers_says_so(tokenizer, quick_args):
    """Its figures are NaN, and there: a metric that the best model is chosen by must not be missing."""
    model, data = with_one_poisoned_pair(tokenizer)
    trainer = AMATrainer(
        model, args=quick_args(), train_dataset=data, eval_dataset=data, processing_class=tokenizer, peft_config=lora()
    )
    metrics = trainer.evaluate()
    assert math.isnan(metrics["eval_worst_excess"]) and math.isnan(metrics["eval_ama/excess/sort"])


@pytest.mark.parametrize("order", [["a", "b"], ["b", "a"]])
def test_the_worst_of_tasks_of_which_one_is_nan_is_nan(order):
    by_task = {"a": {"excess": 0.1, "accuracy": 0.5}, "b": {"excess": math.nan, "accuracy": math.nan}}
    figures = worst_and_mean({task: by_task[task] for task in order})
    assert math.isnan(figures["worst_excess"]) and math.isnan(figures["worst_accuracy"])


# ---- Nothing to learn ----


def with_specialist(data, chosen, rejected):
    """The pairs with one log-prob each for a specialist's chosen and rejected answer."""
    for column, value in (("specialist_chosen_logps", chosen), ("specialist_rejected_logps", rejected)):
        data = data.remove_columns(column).add_column(column, np.full(len(data), value, dtype=np.float32))
    return data


def test_all_pairs_clipped_is_a_step_of_exactly_nothing(model_dir, quick_args):
    data = with_specialist(with_reference_columns(make_dataset({"list": 20, "sort": 20})), -90.0, -5.0)
    trainer = AMATrainer(model_dir, args=quick_args(mixing="ama_s"), train_dataset=data, peft_config=lora())
    before = weights_of(trainer)
    trainer.train()
    assert losses_of(trainer) == [0.0] * 4 and logged(trainer, "grad_norm") == [0.0] * 4
    assert logged(trainer, "ama/clipped_fraction/list") == [1.0] * 4
    assert all(torch.equal(value, before[name]) for name, value in weights_of(trainer).items())
    np.testing.assert_array_equal(trainer.strategy.probabilities(), HALVES)


def test_a_specialist_worse_than_the_base_asks_for_nothing(model_dir, quick_args):
    """Its task keeps the floor of the draws, and the other gets the rest."""
    data = with_reference_columns(make_dataset({"list": 20, "sort": 20}))
    worse = with_specialist(data.select(range(20)), -90.0, -5.0)
    better = with_specialist(data.select(range(20, 40)), -5.0, -90.0)
    trainer = AMATrainer(
        model_dir,
        args=quick_args(mixing="ama_s", mixing_lr=5.0, max_steps=8),
        train_dataset=concatenate_datasets([worse, better]),
        peft_config=lora(),
    )
    trainer.train()
    assert set(logged(trainer, "ama/excess/list")) == {0.0} and min(logged(trainer, "ama/excess/sort")) > 0.1
    assert trainer.strategy.probabilities()[0] == pytest.approx(0.05, abs=1e-3)  # c / k


def run_monitor(matched, idle, steps=120, num_steps=120, monitor=None):
    """(step, warning) of a run in which `matched` and `idle` say what a step was like."""
    monitor = monitor or MixtureMonitor(["code", "chat"])
    warned = []
    for step in range(1, steps + 1):
        excess = np.where(matched(step), 0.0, 1.0)
        new = monitor.update(HALVES, excess, num_steps, np.array(matched(step)), idle(step))
        warned += [(step, text) for text in new if not text.startswith("Stagnation")]
    return warned


def test_a_task_without_excess_from_the_start_is_named_once():
    ((step, text),) = run_monitor(lambda step: [True, False], lambda step: False)
    assert step == 50 and text.startswith("No excess: none of the pairs of task 'code' had any in all 50 steps")
    assert "no better than the base model" in text
    assert run_monitor(lambda step: [step != 3, False], lambda step: False) == []  # it had some: it was learned
    assert run_monitor(lambda step: [True, False], lambda step: False, steps=49) == []


def test_steps_without_any_gradient_are_told_of_once():
    ((step, text),) = run_monitor(lambda step: [step > 10] * 2, lambda step: step > 10)
    assert step == 60 and text.startswith(
        "Nothing to learn: no pair of the last 50 steps had excess; the loss and its"
    )
    assert "Every task has reached its specialist" in text
    ((step, text),) = run_monitor(lambda step: [True, True], lambda step: True)
    assert step == 50 and "since the first step, so no specialist seems better than the base model" in text
    assert run_monitor(lambda step: [True, True], lambda step: step % 50 != 0) != []  # but of tasks, not of idle steps


def test_the_monitor_goes_on_from_a_checkpoint_of_the_first_release():
    monitor = MixtureMonitor(["code", "chat"])
    run_monitor(lambda step: [True, False], lambda step: False, steps=30, monitor=monitor)
    state = json.loads(json.dumps(monitor.state_dict()))
    again = MixtureMonitor(["code", "chat"])
    again.load_state_dict(state)
    assert [step for step, _ in run_monitor(lambda step: [True, False], lambda step: False, monitor=again)] == [20]
    for field in ("matched_steps", "warned_matched", "idle_steps"):
        del state[field]
    old = MixtureMonitor(["code", "chat"])
    old.load_state_dict(state)  # whose first steps nobody knows
    assert run_monitor(lambda step: [True, False], lambda step: False, monitor=old) == []


@pytest.mark.parametrize("clip", ["pair", "task", "none"])
def test_idle_means_that_no_pair_sent_a_gradient(clip):
    """`excess_clip="none"` goes past the specialists, so all pairs below them are no idle step."""
    strategy = build_strategy("ama_s", [1, 1], mixing_lr=1e-9, excess_clip=clip)
    mixture = Mixture(strategy, ["code", "chat"], 0.7)
    mixture.begin(100)
    texts = []
    for _ in range(60):
        recorder = StepRecorder(2)
        raw = torch.tensor([-1.0, -0.5, -1.0, -0.5])
        recorder.add(torch.tensor([0, 0, 1, 1]), 1 + raw, raw.clamp(min=0) if clip == "pair" else raw, raw)
        mixture.recorder = recorder
        texts += mixture.finish_step(PROCESS)[1]
    assert any(text.startswith("Nothing to learn") for text in texts) == (clip != "none")


# ---- Small mixtures ----


def test_a_task_with_one_pair_and_a_step_without_a_task(model_dir, quick_args):
    data = with_reference_columns(make_dataset({"list": 15, "sort": 1}))
    trainer = AMATrainer(
        model_dir,
        args=quick_args(mixing="ama_r", sampling="proportional", per_device_train_batch_size=4, max_steps=6),
        train_dataset=data,
        peft_config=lora(),
    )
    trainer.train()
    assert len(losses_of(trainer)) == 6 and 0 < len(logged(trainer, "ama/loss/sort")) < 6  # a pair in 4 steps of 4
    assert len(logged(trainer, "ama/weight/sort")) == 6 and np.isfinite(logged(trainer, "ama/weight/sort")).all()
    uniform = AMATrainer(model_dir, args=quick_args(mixing="uniform"), train_dataset=data, peft_config=lora())
    uniform.train()
    assert len(logged(uniform, "ama/loss/sort")) == 4  # half of the draws are that one pair


def test_a_single_task_trains_with_a_fixed_mixture(model_dir, quick_args):
    data = with_reference_columns(make_dataset({"list": 16}))
    trainer = AMATrainer(model_dir, args=quick_args(mixing="uniform"), train_dataset=data, peft_config=lora())
    trainer.train()
    assert logged(trainer, "ama/probability/list") == [1.0] * 4
