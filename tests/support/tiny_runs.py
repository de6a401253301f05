"""Settings of a quick run, and what a trainer has logged and learnt."""

# Training arguments of every quick, silent run on a CPU
QUICK = {
    "per_device_train_batch_size": 8,
    "max_length": 64,
    "beta": 0.5,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}
# What the recipe of such a run says, beside its model, tasks and numbers of steps
RECIPE = {
    **QUICK,
    "mixing": "ama_s",
    "use_peft": True,
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_target_modules": "all-linear",
    "learning_rate": 5e-3,
    "per_device_eval_batch_size": 16,
    "logging_steps": 1,
    "seed": 3,
}


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def weights_of(trainer):
    return {name: value.clone() for name, value in trainer.model.named_parameters() if value.requires_grad}


def assert_learns(trainer) -> None:
    """Of `sort` and `brief`, which want opposite things, both are learned on held-out pairs."""
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_worst_accuracy"] <= 0.65
    assert after["eval_ama/accuracy/brief"] > 0.95
    assert after["eval_worst_accuracy"] > 0.7, after
