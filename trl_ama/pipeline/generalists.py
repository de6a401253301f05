"""The generalists: one `AMATrainer` run per mixing strategy, all on the same reference losses."""

from accelerate.utils import release_memory
from transformers import set_seed

from ..common.errors import AMAError
from ..common.processes import from_main
from ..dpo.ama_trainer import AMATrainer
from ..recipe.fingerprint import generalist_fingerprint
from ..recipe.settings import RunSettings
from ..training.stage import TrainingStage
from .run_losses import joined_data, reference_losses_of


def generalist_stage(settings: RunSettings, strategy: str) -> TrainingStage:
    """The stage that trains one strategy's generalist."""
    losses = reference_losses_of(settings)
    fingerprint = generalist_fingerprint(settings.recipe, settings.inputs, losses, strategy)
    return TrainingStage(settings.folder.generalist(strategy), f"The generalist '{strategy}'", fingerprint)


class GeneralistTrainer(AMATrainer):
    """The pipeline's [`AMATrainer`]. Its whole difference: the repository to push to was created when the run began, so that
    no network is needed in the middle of it; and the policy is known to start from the reference, so reference log-probs
    that are not the policy's own are an error.
    """

    def init_hf_repo(self, token=None, private=None):
        self.hub_model_id = self.args.hub_model_id
        self.push_in_progress = None

    def report_foreign_reference(self, message):
        raise AMAError(message)


def train_generalist(settings: RunSettings, strategy: str, repo_id: str | None = None) -> dict[str, float]:
    """Train one strategy's generalist, unless it is finished already.

    Args:
        settings ([`RunSettings`]): The run.
        strategy (`str`): Its mixing strategy.
        repo_id (`str`, *optional*): Where the recipe's own generalist is pushed to; checkpoints are pushed while it trains,
            if `hub_strategy` says so.

    Returns:
        `dict` of `steps`, `train_loss` and `train_runtime` (seconds).

    Raises:
        AMAError: If reference losses are missing, or the folder holds a generalist that other settings made.
    """
    stage = generalist_stage(settings, strategy)
    stage.check()
    done = from_main(lambda: stage.result)  # of one opinion, whatever a network filesystem shows the others by now
    if done is not None:
        return done
    recipe, inputs = settings.recipe, settings.inputs
    pushes = repo_id is not None and strategy == recipe.training_args.mixing
    args = recipe.with_arguments(
        mixing=strategy,
        output_dir=str(stage.folder),
        push_to_hub=pushes,
        hub_model_id=repo_id if pushes else None,
    )
    data = joined_data(settings)
    set_seed(args.seed)  # fresh adapters are drawn here, whatever was or was not done before in this process
    trainer = GeneralistTrainer(
        model=recipe.model_name,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data.get("test") if args.eval_strategy != "no" else None,
        processing_class=inputs.processing_class,
        quantization_config=recipe.quantization_config(),
        peft_config=inputs.peft_config(),
    )
    trainer.what = stage.what
    stage.train(trainer)
    inputs.restore_template(stage.folder)
    summary = trainer.state.log_history[-1]
    result = {"steps": trainer.state.global_step, **{key: summary.get(key) for key in ("train_loss", "train_runtime")}}
    # While the trackers' runs are open, whose addresses are in the card
    trainer.create_model_card(
        model_name=repo_id.split("/")[-1] if pushes else " ".join(f"{settings.folder.path.name}-{strategy}".split())
    )
    stage.finish(result)
    del trainer
    release_memory()
    return result
