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


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def weights_of(trainer):
    return {name: value.clone() for name, value in trainer.model.named_parameters() if value.requires_grad}
