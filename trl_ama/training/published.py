"""A trainer's card and repository: what is done otherwise than in the Trainer when it publishes."""

from pathlib import Path

from ..common.hub import HubTarget, check_login, full_id, prepare, time_limit


class Published:
    """
    A part of a [`~transformers.Trainer`]: its pushes survive a bad network and can never hold a run up for ever.
    """

    # The repository is created as the Trainer does it, with retries, and one sentence rather than the client's traceback
    def init_hf_repo(self, token=None, private=None):
        if not self.is_world_process_zero():
            return
        token = token or self.args.hub_token
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        private = self.args.hub_private_repo if private is None else private
        target = HubTarget(full_id(name, check_login(token), "hub_model_id"), private=private, token=token)
        prepare(target)
        self.hub_model_id, self.push_in_progress = target.repo_id, None

    def train(self, *args, **kwargs):
        with time_limit():  # for the pushes in the background, which could hold up the end of training for ever
            return super().train(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder):
        # PEFT's stub of a card names a local base model by its path, with which the Hub refuses the whole push
        if self.is_world_process_zero():
            Path(checkpoint_folder, "README.md").unlink(missing_ok=True)
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        if model_name is None:  # the one that a checkpoint's card has
            model_name = Path(self.args.hub_model_id or self.args.output_dir).name
        super().create_model_card(model_name=model_name, dataset_name=dataset_name, tags=tags)
