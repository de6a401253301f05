"""A `DPOTrainer` whose errors at the start, which are those of the libraries below it, are one sentence each."""

from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset

from ..common.errors import AMAError
from ..common.others_errors import told
from ..policies.adapter_settings import check_adapter, check_head
from ..policies.token_limits import TokenLimits
from .rehearsal import check_batches, check_kind, check_tokenizer, empty_policy, explained


class StartErrors:
    """
    A part of a [`~trl.DPOTrainer`]: it says in one sentence, naming the keys, why that cannot be made or cannot begin.

    What DPOTrainer trains, it trains; an error stays of the kind that DPOTrainer raises.

    Attributes:
        what (`str`): Who is trained, for messages.
    """

    what = "The policy"

    def __init__(self, model: Any, *args: Any, **kwargs: Any):
        config = kwargs.get("peft_config")
        given = kwargs.get("args") or next((one for one in args if hasattr(one, "per_device_train_batch_size")), None)

        def explain(error: Exception) -> str | None:
            if isinstance(error, IndexError) and "out of range" in str(error):
                return "Some token, or some position, is beyond the model's embeddings: use the tokenizer that the model was made with."
            if "`pad_token` ('None')" in str(error):
                return "Set `pad_token` in the model's tokenizer_config.json."
            if config is None:
                return explained(error, None)
            policy = model if isinstance(model, torch.nn.Module) else _empty(model, given)
            if policy is not None:
                check_adapter(policy, config)
            return explained(error, policy)

        with told("This cannot be trained", "the training arguments and the model", explain):
            super().__init__(model, *args, **kwargs)
        check_kind(self.model.name_or_path, self.model.config)
        if is_peft_model(self.model):
            check_head(self.model)
        if config is not None:
            check_adapter(self.model, config, is_on=True)  # warns of what PEFT did without a word
        limits = TokenLimits(self.model, self._tokenizer)
        if limits.apply(self.args.max_length):
            held_out = (
                self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval_dataset": self.eval_dataset}
            )
            for where, part in {"train_dataset": self.train_dataset, **held_out}.items():
                if isinstance(part, Dataset):
                    limits.check(part, where, self.args.max_length)

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        if isinstance(dataset, Dataset) and len(dataset):
            check_tokenizer(self._tokenizer, args, dataset)
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)

    def get_train_dataloader(self):
        with told(
            "There are no batches", "per_device_train_batch_size, train_sampling_strategy and the dataloader_* keys"
        ):
            if isinstance(self.train_dataset, Dataset):
                check_batches(self.what, self.args, len(self.train_dataset), self.train_dataset.column_names)
            return super().get_train_dataloader()

    def create_optimizer(self, *args, **kwargs):
        with told(
            f"optim '{getattr(self.args.optim, 'value', self.args.optim)}' cannot be made",
            "optim, optim_args and optim_target_modules",
        ):
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args, **kwargs):
        kind = getattr(self.args.lr_scheduler_type, "value", self.args.lr_scheduler_type)
        with told(
            f"lr_scheduler_type '{kind}' cannot be made",
            f"lr_scheduler_kwargs (now {self.args.lr_scheduler_kwargs or {}}) and warmup_steps",
        ):
            return super().create_scheduler(*args, **kwargs)


def _empty(name: str, args: Any) -> torch.nn.Module | None:
    try:
        return empty_policy(
            name,
            getattr(args, "model_init_kwargs", None) or {},
            trust_remote_code=getattr(args, "trust_remote_code", False),
        )
    except (AMAError, OSError):
        return None
