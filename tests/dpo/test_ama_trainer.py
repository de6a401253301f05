"""What `AMATrainer` draws, weighs, logs, saves and learns."""

import inspect
import json
import pickle
import pickletools
import subprocess
import sys
import typing

import numpy as np
import pytest
import torch
from datasets import ClassLabel
from peft import LoraConfig, PeftModel
from tiny_models import SIZES as TINY_SIZES
from tiny_models import lora, make_model
from tiny_pairs import make_dataset, with_reference_columns
from tiny_runs import QUICK, assert_learns, losses_of, weights_of
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

import trl_ama
from trl_ama import AMAConfig, AMATrainer
from trl_ama.dpo.losses import PairLogProbs, PreferenceLossConfig, pair_losses
from trl_ama.dpo.pair_trainer import ScoringTrainer
from trl_ama.dpo.scoring import score_pairs
from trl_ama.reference_losses.columns import LOGP_COLUMNS


SIZES = {"list": 40, "sort": 12, "brief": 28}


@pytest.fixture(scope="module")
def specialists(model_dir, tmp_path_factory):
    """A quickly trained adapter for each task."""
    paths = {}
    for task in SIZES:
        path = tmp_path_factory.mktemp("specialists") / task
        args = DPOConfig(str(path), max_steps=20, learning_rate=5e-3, **QUICK)
        trainer = DPOTrainer(
            model_dir, args=args, train_dataset=make_dataset({task: 64}).remove_columns("task"), peft_config=lora()
        )
        trainer.train()
        trainer.save_model(str(path))
        paths[task] = str(path)
    return paths


@pytest.fixture(scope="module")
def merged_log_probs(model_dir, tokenizer, specialists, tmp_path_factory):
    """What PEFT gives for each merged specialist on its task's pairs, an independent way to the same numbers."""
    from transformers import AutoModelForCausalLM

    expected = {}
    for task, path in specialists.items():
        merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), path).merge_and_unload()
        scorer = ScoringTrainer(
            merged,
            args=DPOConfig(str(tmp_path_factory.mktemp("merged")), precompute_ref_log_probs=True, **QUICK),
            train_dataset=make_dataset(SIZES).filter(lambda row, name=task: row["task"] == name),
            processing_class=tokenizer,
        )
        expected[task] = score_pairs(scorer, scorer.model, scorer.train_dataset, "")["chosen_logps"]
    return expected


def test_every_argument_of_dpo_trainer_is_there():
    ours = list(inspect.signature(AMATrainer.__init__).parameters)
    theirs = list(inspect.signature(DPOTrainer.__init__).parameters)
    assert ours[: len(theirs)] == theirs
    assert ours[len(theirs) :] == ["specialists"]


def test_from_trl_import_after_import_trl_ama():
    code = (
        "import trl_ama, sys; heavy = {'torch', 'transformers', 'datasets', 'peft', 'matplotlib', 'bitsandbytes'};"
        "print(sorted(heavy & set(sys.modules)));"
        "from trl import AMAConfig, AMATrainer; import trl_ama as t;"
        "print(AMATrainer is t.AMATrainer and AMAConfig is t.AMAConfig)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split("\n")
    assert out[:2] == ["[]", "True"]


@pytest.mark.parametrize(
    "name", ["AMAConfig", "AMATrainer", "AMAError", "run_pipeline", "load_tasks", "MixingStrategy"]
)
def test_public_names_can_be_imported(name):
    assert name in trl_ama.__all__
    assert getattr(trl_ama, name).__name__ == name


def test_pickled_arguments_name_the_config_by_its_public_place(quick_args):
    """As `training_args.bin` does, which others load by that name; nothing of it may depend on a file's name."""
    args = quick_args(mixing="uniform")
    names = {name for opcode, name, _ in pickletools.genops(pickle.dumps(args)) if isinstance(name, str)}
    assert "trl_ama" in names and not [name for name in names if name.startswith("trl_ama.")]
    assert type(pickle.loads(pickle.dumps(args))) is AMAConfig is trl_ama.AMAConfig
    assert typing.get_type_hints(AMAConfig)["mixing_lr"] == float | str | None  # as command lines read it


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'AMATrainr'"):
        trl_ama.AMATrainr  # noqa: B018


def test_columns_mean_no_reference_model_and_no_reference_forward(model_dir, quick_args, monkeypatch):
    """Full fine-tuning, where DPOTrainer would load a second model."""
    loads, forwards = [], []
    import trl.trainer.dpo_trainer as module

    original = module.create_model_from_path
    monkeypatch.setattr(module, "create_model_from_path", lambda *a, **k: loads.append(a) or original(*a, **k))
    monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", lambda *a: forwards.append(a))
    data = with_reference_columns(make_dataset(SIZES))
    trainer = AMATrainer(model_dir, args=quick_args(mixing="ama_s"), train_dataset=data, eval_dataset=data)
    trainer.train()
    metrics = trainer.evaluate()
    assert trainer.ref_model is None
    assert len(loads) == 1 and forwards == []
    assert "eval_worst_excess" in metrics
    # also for pairs that come later, where DPOTrainer would refuse
    assert trainer.evaluate(with_reference_columns(make_dataset(SIZES, seed=3)))["eval_worst_excess"] > 0


def test_without_columns_later_pairs_need_them_too(model_dir, quick_args):
    trainer = AMATrainer(
        model_dir, args=quick_args(max_steps=1), train_dataset=with_reference_columns(make_dataset(SIZES))
    )
    trainer.train()
    with pytest.raises(ValueError, match="reference"):
        trainer.evaluate(make_dataset(SIZES, seed=3))


@pytest.mark.parametrize("peft", [True, False])
def test_specialists_by_path_give_their_own_log_probs(model_dir, quick_args, specialists, merged_log_probs, peft):
    """The columns equal what PEFT gives for the merged specialist."""
    data, held_out = make_dataset(SIZES), make_dataset(SIZES, seed=1)
    trainer = AMATrainer(
        model_dir,
        args=quick_args(mixing="ama_s", specialists=specialists),
        train_dataset=data,
        eval_dataset=held_out,
        peft_config=lora() if peft else None,
    )
    assert set(LOGP_COLUMNS) <= set(trainer.train_dataset.column_names)
    assert set(LOGP_COLUMNS) <= set(trainer.eval_dataset.column_names)
    trainable = {name for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert trainable and all(("default" in name) == peft for name in trainable)
    for index, task in enumerate(trainer.task_names):
        rows = np.flatnonzero(np.asarray(trainer.train_dataset["task"]) == index)
        ours = np.asarray(trainer.train_dataset["specialist_chosen_logps"])[rows]
        np.testing.assert_allclose(ours, merged_log_probs[task], rtol=1e-4, atol=1e-4)
    # and the specialists are better than the base on their own pairs, so these are real targets
    config = PreferenceLossConfig(["sigmoid"], beta=0.5)
    columns = {name: torch.tensor(np.asarray(trainer.train_dataset[name])) for name in LOGP_COLUMNS}
    ones = torch.ones(len(data))
    loss = pair_losses(
        PairLogProbs(
            columns["specialist_chosen_logps"],
            columns["specialist_rejected_logps"],
            columns["ref_chosen_logps"],
            columns["ref_rejected_logps"],
            ones,
            ones,
        ),
        config,
    )
    assert loss.mean() < 0.6
    trainer.train()


def test_specialists_as_models(model_dir, quick_args, specialists):
    """Loaded models, a PEFT model and a path give the same columns."""
    from transformers import AutoModelForCausalLM

    peft_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), specialists["list"])
    merged = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model_dir), specialists["sort"]
    ).merge_and_unload()
    columns = []
    for given in ({**specialists, "list": peft_model, "sort": merged}, specialists):
        trainer = AMATrainer(
            model_dir, args=quick_args(), train_dataset=make_dataset(SIZES), peft_config=lora(), specialists=given
        )
        columns.append(np.asarray(trainer.train_dataset["specialist_rejected_logps"]))
    np.testing.assert_allclose(*columns, rtol=1e-4, atol=1e-4)


def test_a_full_model_folder_as_specialist(model_dir, quick_args, tmp_path, tokenizer):
    make_model(len(tokenizer), seed=5).save_pretrained(tmp_path / "full")
    trainer = AMATrainer(
        model_dir,
        args=quick_args(max_steps=2),
        train_dataset=make_dataset(SIZES),
        peft_config=lora(),
        specialists={task: str(tmp_path / "full") for task in SIZES},
    )
    trainer.train()
    assert not np.allclose(trainer.train_dataset["specialist_chosen_logps"], trainer.train_dataset["ref_chosen_logps"])


def test_excess_is_zero_at_the_start_if_the_specialist_is_the_base(model_dir, quick_args):
    """Clipped by pair, then, nothing is left to learn: the first steps move nothing."""
    data = with_reference_columns(make_dataset(SIZES))
    for side in ("chosen", "rejected"):
        data = data.remove_columns(f"specialist_{side}_logps")
        data = data.add_column(f"specialist_{side}_logps", data[f"ref_{side}_logps"])
    trainer = AMATrainer(
        model_dir, args=quick_args(max_steps=1, weight_decay=0.0), train_dataset=data, peft_config=lora()
    )
    # the made-up reference log-probs are far from the base's, so take the base's own
    real = trainer.compute_ref_log_probs(
        trainer.model, trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(80)]))
    )
    for side, values in zip(("chosen", "rejected"), real, strict=True):
        for owner in ("ref", "specialist"):
            data = data.remove_columns(f"{owner}_{side}_logps")
            data = data.add_column(f"{owner}_{side}_logps", values.cpu().numpy())
    trainer = AMATrainer(
        model_dir, args=quick_args(max_steps=1, weight_decay=0.0), train_dataset=data, peft_config=lora()
    )
    before = weights_of(trainer)
    trainer.train()
    assert trainer.state.log_history[0]["ama/excess/list"] == pytest.approx(0, abs=1e-5)
    assert losses_of(trainer)[0] == pytest.approx(0, abs=1e-5)
    assert all(torch.allclose(value, weights_of(trainer)[name], atol=1e-3) for name, value in before.items())


def test_evaluation_by_task_and_worst_task(model_dir, quick_args):
    data, held_out = with_reference_columns(make_dataset(SIZES)), with_reference_columns(make_dataset(SIZES, seed=1))
    trainer = AMATrainer(model_dir, args=quick_args(), train_dataset=data, eval_dataset=held_out, peft_config=lora())
    metrics = trainer.evaluate()
    config = PreferenceLossConfig(["sigmoid"], beta=0.5)
    scores = score_pairs(trainer, trainer.model, trainer.eval_dataset, "")
    column = {name: torch.tensor(np.asarray(trainer.eval_dataset[name])) for name in LOGP_COLUMNS}
    ones = torch.ones(len(held_out))
    references = (column["ref_chosen_logps"], column["ref_rejected_logps"])
    policy = PairLogProbs(
        *(torch.tensor(scores[f"{side}_logps"]) for side in ("chosen", "rejected")), *references, ones, ones
    )
    specialist = PairLogProbs(
        column["specialist_chosen_logps"], column["specialist_rejected_logps"], *references, ones, ones
    )
    excess = (pair_losses(policy, config) - pair_losses(specialist, config)).clamp(min=0)
    margins = 0.5 * (policy.chosen_logratios - policy.rejected_logratios)
    tasks = np.asarray(trainer.eval_dataset["task"])
    for index, task in enumerate(trainer.task_names):
        rows = tasks == index
        assert metrics[f"eval_ama/excess/{task}"] == pytest.approx(excess[rows].mean().item(), rel=1e-4)
        assert metrics[f"eval_ama/accuracy/{task}"] == pytest.approx((margins[rows] > 0).float().mean().item())
        assert metrics[f"eval_ama/loss/{task}"] == pytest.approx(
            pair_losses(policy, config)[rows].mean().item(), rel=1e-4
        )
        assert metrics[f"eval_ama/margin/{task}"] == pytest.approx(margins[rows].mean().item(), rel=1e-3, abs=1e-4)
    assert metrics["eval_worst_excess"] == max(metrics[f"eval_ama/excess/{task}"] for task in trainer.task_names)
    assert metrics["eval_worst_accuracy"] == min(metrics[f"eval_ama/accuracy/{task}"] for task in trainer.task_names)
    # DPOTrainer's own figures are still there
    assert {"eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"} <= set(metrics)


def test_worst_excess_chooses_the_best_model(model_dir, quick_args, tmp_path):
    data = with_reference_columns(make_dataset(SIZES))
    trainer = AMATrainer(
        model_dir,
        args=quick_args(
            max_steps=6,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_worst_excess",
            greater_is_better=False,
        ),
        train_dataset=data,
        eval_dataset=data,
        peft_config=lora(),
    )
    trainer.train()
    seen = [entry["eval_worst_excess"] for entry in trainer.state.log_history if "eval_worst_excess" in entry]
    assert len(seen) == 3 and trainer.state.best_metric == min(seen)


def test_class_labels_and_strings_are_the_same(model_dir, quick_args):
    data = with_reference_columns(make_dataset(SIZES))
    labelled = data.cast_column("task", ClassLabel(names=["brief", "list", "sort"]))
    runs = []
    for dataset in (data, labelled):
        trainer = AMATrainer(model_dir, args=quick_args(), train_dataset=dataset, peft_config=lora())
        trainer.train()
        runs.append(losses_of(trainer))
    assert trainer.task_names == ["brief", "list", "sort"]
    assert runs[0] == runs[1]


def test_a_users_collator_dict_evaluation_and_compute_metrics(model_dir, quick_args, tokenizer):
    data = with_reference_columns(make_dataset(SIZES))
    seen = []

    class Collator(DataCollatorForPreference):
        def torch_call(self, examples):
            seen.append(len(examples))
            return super().torch_call(examples)

    trainer = AMATrainer(
        model_dir,
        args=quick_args(max_steps=2, per_device_eval_batch_size=8),
        train_dataset=data,
        eval_dataset={"first": data.select(range(8)), "plain": make_dataset({"sort": 8}, seed=2, labelled=False)},
        data_collator=Collator(pad_token_id=tokenizer.pad_token_id, max_length=64),
        compute_metrics=lambda prediction: {"shape": float(len(prediction.label_ids))},
        peft_config=lora(),
    )
    trainer.train()
    with pytest.warns(FutureWarning, match="return_outputs"):
        metrics = trainer.evaluate()
    assert len(seen) > 2
    assert "eval_first_worst_excess" in metrics and "eval_plain_loss" in metrics
    assert "eval_plain_worst_accuracy" not in metrics  # no tasks there
    assert metrics["eval_first_shape"] > 0


@pytest.mark.parametrize("clip", ["pair", "task", "none"])
def test_excess_clip(model_dir, quick_args, clip):
    data = with_reference_columns(make_dataset(SIZES))
    trainer = AMATrainer(
        model_dir, args=quick_args(excess_clip=clip, max_steps=3), train_dataset=data, peft_config=lora()
    )
    trainer.train()
    values = [v for entry in trainer.state.log_history for k, v in entry.items() if k.startswith("ama/excess/")]
    assert (min(values) >= 0) == (clip == "pair")


def test_adaptive_draws_follow_the_lagging_task(model_dir, quick_args):
    """One task's specialist is far ahead, the others' are the base: AMA-S draws it, AMA-R weighs it."""
    data = with_reference_columns(make_dataset(SIZES))
    ahead = np.asarray(data["task"]) == "sort"
    for owner, side, value in (
        ("ref", "chosen", -20.0),
        ("ref", "rejected", -20.0),
        ("specialist", "chosen", np.where(ahead, -10.0, -40.0)),
        ("specialist", "rejected", np.where(ahead, -30.0, -20.0)),
    ):
        name = f"{owner}_{side}_logps"
        data = data.remove_columns(name).add_column(name, np.broadcast_to(value, len(data)).astype(np.float32))
    for mixing, figure in (("ama_s", "probability"), ("ama_r", "weight")):
        trainer = AMATrainer(
            model_dir,
            args=quick_args(mixing=mixing, mixing_lr=0.5, max_steps=10, learning_rate=1e-5),
            train_dataset=data,
            peft_config=lora(),
        )
        trainer.train()
        final = {task: trainer.state.log_history[-2][f"ama/{figure}/{task}"] for task in SIZES}
        assert max(final, key=final.get) == "sort" and final["sort"] > 0.5, (mixing, final)


def test_what_is_learned(model_dir, quick_args):
    """Sixty steps of AMA-S on two tasks in conflict: both are learned on held-out pairs."""
    sizes = {"sort": 200, "brief": 600}
    trainer = AMATrainer(
        model_dir,
        args=quick_args(
            mixing="ama_s", max_steps=60, learning_rate=1e-2, logging_steps=20, per_device_train_batch_size=16
        ),
        train_dataset=make_dataset(sizes),
        eval_dataset=make_dataset({"sort": 60, "brief": 60}, seed=1),
        peft_config=LoraConfig(r=8, target_modules="all-linear"),
    )
    assert_learns(trainer)


def test_automatic_batch_size(model_dir, quick_args, monkeypatch):
    """The batch size is halved when memory runs out; blocks follow it."""
    original, failed = DPOTrainer.training_step, []

    def out_of_memory_once(self, *args, **kwargs):
        if not failed:
            failed.append(True)
            raise RuntimeError("CUDA out of memory.")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(DPOTrainer, "training_step", out_of_memory_once)
    trainer = AMATrainer(
        model_dir,
        args=quick_args(auto_find_batch_size=True, max_steps=12),
        train_dataset=with_reference_columns(make_dataset(SIZES)),
        peft_config=lora(),
    )
    trainer.train()
    assert failed and trainer._train_batch_size < 8 and trainer.state.global_step == 12
    assert trainer.mixture.sampler.state_dict()["block_size"] == trainer._train_batch_size


def test_no_excess_is_made_up(model_dir, quick_args):
    """A fixed mixture without reference losses has none to log."""
    data = make_dataset(SIZES)
    args = quick_args(mixing="uniform", max_steps=2)
    trainer = AMATrainer(model_dir, args=args, train_dataset=data, eval_dataset=data, peft_config=lora())
    trainer.train()
    trainer.evaluate()
    seen = {key for entry in trainer.state.log_history for key in entry}
    assert "ama/loss/list" in seen and "eval_worst_accuracy" in seen
    assert not {key for key in seen if "excess" in key or "clipped" in key}


def test_the_callers_arguments_stay_as_they_are(model_dir, quick_args):
    args = quick_args()
    AMATrainer(model_dir, args=args, train_dataset=with_reference_columns(make_dataset(SIZES)))
    assert args.precompute_ref_log_probs is False


def test_state_is_json(model_dir, quick_args, tmp_path):
    data = with_reference_columns(make_dataset(SIZES))
    trainer = AMATrainer(
        model_dir,
        args=quick_args(save_strategy="steps", save_steps=2),
        train_dataset=data,
        peft_config=lora(),
    )
    trainer.train()
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    mixing = state["stateful_callbacks"]["ama"]
    assert mixing["version"] == 1 and mixing["task_names"] == ["brief", "list", "sort"]
    assert mixing["strategy"]["name"] == "ama_s"
    assert all(len(block["probabilities"]) == 3 for block in mixing["sampler"]["ahead"])


def test_moe_auxiliary_loss_is_kept(quick_args, tokenizer):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        **{**TINY_SIZES, "intermediate_size": 32, "num_hidden_layers": 1},
        num_local_experts=2,
        output_router_logits=True,
        router_aux_loss_coef=10.0,
        pad_token_id=0,
    )
    data = with_reference_columns(make_dataset({"list": 16, "sort": 16}))
    losses = []
    for coefficient in (10.0, 0.0):
        trainer = AMATrainer(
            MixtralForCausalLM(config),
            args=quick_args(max_steps=1, router_aux_loss_coef=coefficient),
            train_dataset=data,
            processing_class=tokenizer,
        )
        trainer.train()
        losses.append(losses_of(trainer)[0])
    assert losses[0] - losses[1] > 5  # a balanced router's auxiliary loss is about 1, times 10


def test_default_configuration_is_an_ama_config(model_dir, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AMAConfig, "__post_init__", _on_cpu(AMAConfig.__post_init__))
    trainer = AMATrainer(model_dir, train_dataset=with_reference_columns(make_dataset(SIZES)), peft_config=lora())
    assert type(trainer.args) is AMAConfig and trainer.args.output_dir.endswith("-AMA")


def _on_cpu(post_init):
    def run(self):
        self.use_cpu, self.report_to = True, "none"
        post_init(self)

    return run
