"""The generalists: one `AMATrainer` run per mixing strategy, all on the same reference losses."""

import gc

from .ama_trainer import AMATrainer
from .fingerprint import package_versions, relevant_arguments
from .reference_losses import joined_data, reference_fingerprint
from .run_settings import RunSettings
from .training_stage import TrainingStage


def generalist_stage(settings: RunSettings, strategy: str) -> TrainingStage:
    """The stage that trains one strategy's generalist."""
    arguments = relevant_arguments(settings.with_arguments(mixing=strategy), settings.model_args)
    arguments.pop("model_name_or_path", None)
    fingerprint = {
        "base_model": settings.base_identity,
        "reference_losses": {
            task: {key: value for key, value in reference_fingerprint(settings, task).items() if key != "versions"}
            for task in settings.task_names
        },
        **arguments,
        "versions": package_versions(),
    }
    return TrainingStage(settings.generalist_dir(strategy), f"The generalist '{strategy}'", fingerprint)


def train_generalist(settings: RunSettings, strategy: str) -> dict[str, float]:
    """Train one strategy's generalist, unless it is finished already.

    Returns:
        `dict` of `steps`, `train_loss` and `train_runtime` (seconds).

    Raises:
        AMAError: If reference losses are missing, or the folder holds a generalist that other settings made.
    """
    stage = generalist_stage(settings, strategy)
    stage.check()
    if stage.result is not None:
        return stage.result
    args = settings.with_arguments(mixing=strategy, output_dir=str(stage.folder), push_to_hub=False)
    data = joined_data(settings)
    trainer = AMATrainer(
        model=settings.model_name,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data.get("test") if args.eval_strategy != "no" else None,
        quantization_config=settings.quantization_config(),
        peft_config=settings.peft_config(),
    )
    stage.train(trainer)
    summary = trainer.state.log_history[-1]
    result = {"steps": trainer.state.global_step, **{key: summary.get(key) for key in ("train_loss", "train_runtime")}}
    stage.finish(result)
    del trainer
    gc.collect()
    return result
