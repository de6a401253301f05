"""Touch points in transformers: what a Trainer saves, and how it goes on."""

import inspect

from tiny_models import lora
from tiny_pairs import make_dataset
from touched import dpo_fixture, source_of  # noqa: F401 - fixtures
from transformers import Trainer
from trl import DPOConfig, DPOTrainer

from trl_ama import AMAConfig, AMATrainer


def test_13_trainer_state_carries_our_state():
    from transformers.trainer_callback import TrainerState

    source = inspect.getsource(Trainer._save_checkpoint)
    assert "self.state.save_to_json" in source
    assert isinstance(TrainerState().stateful_callbacks, dict)


def test_14_trainer_begins_training_after_reading_the_state():
    source = inspect.getsource(Trainer._inner_training_loop)
    order = [
        source.index(name)
        for name in ("get_train_dataloader", "_init_training_state", "on_train_begin", "_run_epoch(")
    ]
    assert order == sorted(order)


def test_71_what_the_last_callback_says_of_saving_counts(dpo):
    from transformers import DefaultFlowCallback

    callbacks = [type(callback).__name__ for callback in dpo.callback_handler.callbacks]
    assert callbacks[0] == DefaultFlowCallback.__name__
    source = inspect.getsource(Trainer._run_epoch)
    assert source.index("callback_handler.on_step_end") < source.index("_maybe_log_save_evaluate")
    assert "if self.control.should_save:" in inspect.getsource(Trainer._maybe_log_save_evaluate)


def test_75_pushes_of_checkpoints_go_through_a_method():
    assert list(inspect.signature(Trainer._push_from_checkpoint).parameters) == ["self", "checkpoint_folder"]
    assert "self._push_from_checkpoint(output_dir)" in inspect.getsource(Trainer._save_checkpoint)


def test_85_the_best_checkpoint_is_the_folder_of_the_best_step(model_dir, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(DPOTrainer, "_load_best_model", lambda self: loaded.append(self.state.best_model_checkpoint))
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    args = DPOConfig(
        **{"output_dir": str(tmp_path), "bf16": False, "use_cpu": True, "report_to": "none", "max_length": 64, "disable_tqdm": True},
        **{**settings, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True},
    )  # fmt: skip
    data = make_dataset({"list": 8})
    for folders, expected in (([], None), (["checkpoint-1"], str(tmp_path / "checkpoint-1"))):
        for name in folders:
            (tmp_path / name).mkdir()
        trainer = DPOTrainer(model_dir, args=args, train_dataset=data, eval_dataset=data, peft_config=lora())
        trainer.train()
        assert trainer.state.best_global_step == 1 and trainer.state.best_model_checkpoint == expected
    assert loaded == [str(tmp_path / "checkpoint-1")]


def test_40_checkpoints_are_pushed_and_rotated_when_their_files_are_there():
    from transformers.trainer_utils import rotate_checkpoints, sort_checkpoints

    source = source_of(Trainer._save_checkpoint)
    steps = (
        "self.save_model(output_dir,_internal_call=True)",
        "self._save_optimizer_and_scheduler(output_dir)",
        "self.state.save_to_json(",
        "ifself.args.push_to_hub:self._push_from_checkpoint(output_dir)",
        "rotate_checkpoints(output_dir=run_dir,save_total_limit=self.args.save_total_limit,",
    )
    places = [source.index(step) for step in steps]
    assert places == sorted(places)
    assert list(inspect.signature(rotate_checkpoints).parameters)[:4] == [
        "output_dir", "save_total_limit", "best_model_checkpoint", "use_mtime",
    ]  # fmt: skip
    assert "sort_checkpoints(output_dir,checkpoint_prefix,use_mtime)" in source_of(rotate_checkpoints)
    assert list(inspect.signature(sort_checkpoints).parameters)[:3] == ["output_dir", "checkpoint_prefix", "use_mtime"]


def test_41_what_waits_for_the_next_log_entry(dpo):
    source = source_of(Trainer._inner_training_loop)
    begins = source.index("self.callback_handler.on_train_begin(")
    for line in (
        "self._tr_loss=torch.tensor(0.0",
        "self._total_loss_scalar=0.0",
        "self._globalstep_last_logged=self.state.global_step",
    ):
        assert source.index(line) < begins
    assert 'metrics["train_loss"]=train_loss' in source_of(Trainer._finalize_training)
    assert isinstance(dpo._metrics["train"], dict) and type(dpo._total_train_tokens) is int


def test_42_an_epoch_does_a_step_also_when_all_are_done():
    assert "global_step>=" not in source_of(Trainer._run_epoch)
    assert "self._run_epoch(" in source_of(Trainer._inner_training_loop)


def test_43_evaluation_on_start():
    assert list(inspect.signature(Trainer._evaluate).parameters)[1:] == [
        "trial",
        "ignore_keys_for_eval",
        "skip_scheduler",
    ]
    start = "ifargs.eval_on_start:self._evaluate(trial,ignore_keys_for_eval,skip_scheduler=True)"
    assert start in source_of(Trainer._inner_training_loop)
    assert "skip_scheduler" not in source_of(Trainer._maybe_log_save_evaluate).split("):", 1)[1]


def test_44_the_end_of_a_step():
    assert list(inspect.signature(Trainer._maybe_log_save_evaluate).parameters)[1:5] == [
        "tr_loss",
        "grad_norm",
        "model",
        "trial",
    ]
    source = source_of(Trainer._run_epoch)
    for event in ("on_step_end", "on_epoch_end"):
        assert (
            f"self.callback_handler.{event}(self.args,self.state,self.control)self._maybe_log_save_evaluate(" in source
        )
    source = source_of(Trainer._maybe_log_save_evaluate)
    assert (
        source.index("self.log(")
        < source.index("self._evaluate(")
        < source.index("self._save_checkpoint(model,trial)")
    )


def test_45_jit_checkpoints_take_a_signal(model_dir, tmp_path):
    import signal

    before = signal.getsignal(signal.SIGTERM)
    args = {"bf16": False, "use_cpu": True, "report_to": "none", "max_length": 64, "enable_jit_checkpoint": True}
    try:
        for trainer, config, takes in ((DPOTrainer, DPOConfig, True), (AMATrainer, AMAConfig, False)):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            given = config(str(tmp_path), gradient_checkpointing=False, disable_tqdm=True, **args)
            pairs = make_dataset({"list": 8, "sort": 8})
            made = trainer(model_dir, args=given, train_dataset=pairs, peft_config=lora())
            assert (signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL) is takes
            assert given.enable_jit_checkpoint and made.args.enable_jit_checkpoint is takes
    finally:
        signal.signal(signal.SIGTERM, before)
