"""Rehearses a stage before anything is trained: TRL's own trainer is built on the model without weights, and runs a batch.

What DPOTrainer, PEFT, transformers or bitsandbytes refuse comes to light here, in seconds, and not when the first specialist is
trained already. The model lies on the meta device, where tensors have shapes and no contents: it costs no memory and no download.
"""

import contextlib
import copy
import dataclasses
import re
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from datasets import Dataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from peft import PeftConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoConfig,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import logging
from trl import DPOTrainer
from trl.trainer.utils import create_model_from_path

from ..common.errors import AMAError
from ..common.others_errors import told
from ..policies.adapter_settings import check_adapter, check_head, explain_adapter
from ..policies.empty import fill_with_fakes
from .config import AMAConfig


# Arguments of `from_pretrained` that say where weights come from and go to
_OF_WEIGHTS = ("revision", "trust_remote_code", "device_map", "max_memory", "offload_folder", "low_cpu_mem_usage")
_OF_LOADING = ("dtype", "torch_dtype", "attn_implementation", "quantization_config", "use_kernels")


class _RehearsalArguments(AMAConfig):
    """Leaves the model where it is; the Trainer asks for this by a property, to be overridden."""

    @property
    def place_model_on_device(self) -> bool:
        return False


class _Rehearsal(DPOTrainer):
    """A [`~trl.DPOTrainer`] that is built and not trained: it reports nothing and computes nothing beforehand."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.device_placement = False

    def _send_telemetry(self):
        pass

    def _precompute_ref_logps(self, dataset, name, batch_size):
        return dataset


def read_config(name: str, **kwargs: Any) -> PretrainedConfig:
    """A model's configuration; `kwargs` as for `AutoConfig`."""
    with told(f"The configuration of '{name}' cannot be read", "model_name_or_path"):
        return AutoConfig.from_pretrained(name, **kwargs)


def check_kind(name: str, config: PretrainedConfig) -> None:
    """Raise an `AMAError` for a kind of model that DPOTrainer does not train."""
    if getattr(config, "is_encoder_decoder", False):
        raise AMAError(
            f"'{name}' is an encoder-decoder model ({config.model_type}), and DPOTrainer trains models that read a prompt and its "
            "answer as one sequence. Use a causal language model."
        )


def empty_policy(
    name: str,
    init_kwargs: dict[str, Any],
    quantization: BitsAndBytesConfig | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel | None:
    """The model that DPOTrainer would load, without weights; `None` if it brings code of its own.

    Args:
        name (`str`): Path or Hub id.
        init_kwargs (`dict`): `model_init_kwargs` of the training arguments.
        quantization (`BitsAndBytesConfig`, *optional*): As DPOTrainer is given it.
        trust_remote_code (`bool`): As in the training arguments.

    Raises:
        AMAError: If it cannot be built, or is not a model that DPOTrainer trains.
    """
    config = read_config(name, revision=init_kwargs.get("revision"), trust_remote_code=trust_remote_code)
    check_kind(name, config)
    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    if architecture is None:
        return None
    # As `from_pretrained` does: what the configuration knows is set there, and the rest is the model's
    others = {key: value for key, value in init_kwargs.items() if key not in (*_OF_WEIGHTS, *_OF_LOADING)}
    kwargs = {key: value for key, value in init_kwargs.items() if key in _OF_LOADING and value is not None}
    stored = getattr(config, "quantization_config", None)
    quantization = kwargs.pop("quantization_config", quantization)
    if stored is not None:
        stored = stored if isinstance(stored, dict) else stored.to_dict()
        if "bitsandbytes" not in str(stored.get("quant_method")):
            return None
        quantization = quantization or BitsAndBytesConfig.from_dict(stored)
        del config.quantization_config
    with (
        told(
            f"The model '{name}' cannot be made with these settings",
            f"model_init_kwargs, attn_implementation and dtype (given are {sorted({**others, **kwargs})})",
        ),
        _quiet(),
    ):
        for key in [key for key in others if hasattr(config, key)]:
            setattr(config, key, others.pop(key))
        kwargs |= {"config": config, "state_dict": {}, "device_map": "meta"}
        model = create_model_from_path(None, architecture, **kwargs, **others)
        if quantization is not None:
            model.hf_quantizer = AutoHfQuantizer.from_config(quantization)
            model.hf_quantizer.preprocess_model(model, device_map=None)
            setattr(model, f"is_loaded_in_{4 if quantization.load_in_4bit else 8}bit", True)
    model.config._name_or_path = model.name_or_path = name
    return model


def rehearse(
    what: str,
    model: PreTrainedModel,
    args: AMAConfig,
    pairs: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    peft_config: PeftConfig | None = None,
    runs_batch: bool = False,
) -> None:
    """Build DPOTrainer on a model without weights, with a few pairs.

    Args:
        what (`str`): The stage, for messages, e.g. `"The specialist of task 'code'"`.
        model (`PreTrainedModel`): Of [`empty_policy`]; it is changed.
        args ([`AMAConfig`]): The stage's.
        pairs (`Dataset`): A few of its pairs.
        tokenizer (`PreTrainedTokenizerBase`): The model's.
        peft_config (`PeftConfig`, *optional*): The adapter's.
        runs_batch (`bool`): Whether a batch's shapes are run through it, too.

    Raises:
        AMAError: If TRL or a library below it refuses something; the message names the keys to look at.
    """
    check_tokenizer(tokenizer, args, pairs)
    if getattr(model, "is_quantized", False) and peft_config is None:
        raise AMAError(
            f"The weights of '{model.name_or_path}' are quantised, and weights of so few bits cannot be trained themselves. Set "
            "use_peft: true (pass a peft_config), or take the model that they were made from."
        )
    if peft_config is not None:
        peft_config = copy.deepcopy(peft_config)
        if not isinstance(getattr(peft_config, "init_lora_weights", True), bool):
            peft_config.init_lora_weights = False  # some of these look into the base's weights
        check_adapter(model, peft_config)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        with told(
            f"{what} cannot be trained with these settings",
            "the training arguments",
            lambda error: explained(error, model),
        ):
            trainer = _Rehearsal(
                model,
                ref_model=copy.deepcopy(model) if peft_config is None else None,
                args=_rehearsal_arguments(args, folder),
                train_dataset=pairs,
                eval_dataset=pairs if args.eval_strategy != "no" else None,
                processing_class=tokenizer,
                peft_config=peft_config,
            )
        check_head(trainer.model)
        check_optimization(args, trainer.model)
        if not runs_batch or len(trainer.train_dataset) == 0:
            return  # all cut away is told of where the data is looked at
        with told(f"{what} cannot run a batch", "the model and the adapter's settings"):
            _run(trainer, trainer.data_collator([trainer.train_dataset[0]]))


def check_batches(what: str, args: AMAConfig, count: int, columns: list[str]) -> None:
    """Raise an `AMAError` if an epoch has no batch, or batches are to be made by lengths that nobody has.

    Args:
        what (`str`): What is trained, for the message.
        args ([`AMAConfig`]): The training arguments.
        count (`int`): How many pairs there are.
        columns (`list[str]`): What they have.
    """
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and count < batch:
        raise AMAError(
            f"{what} has {count} pairs, and dataloader_drop_last drops what does not fill a batch of {batch} "
            "(per_device_train_batch_size on every process), so nothing would be trained. Lower it, or set "
            "dataloader_drop_last: false."
        )
    by_length = args.train_sampling_strategy in ("group_by_length", "batch_rebalance")
    if by_length and args.length_column_name not in columns:
        raise AMAError(
            f"train_sampling_strategy '{args.train_sampling_strategy}' sorts pairs by a column of lengths, and they have none named "
            f"'{args.length_column_name}' (length_column_name). Add it to the dataset, or use 'random'."
        )


def check_optimization(args: AMAConfig, model: torch.nn.Module) -> None:
    """Raise an `AMAError` if there is no such optimizer or learning-rate schedule, or they do not take their arguments."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    with told(
        f"optim '{getattr(args.optim, 'value', args.optim)}' cannot be made",
        "optim, optim_args and optim_target_modules",
    ):
        make, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if not {"params", "model", "optimizer_dict"} & set(kwargs):  # those that look at the model's own layers
            make([parameter], **kwargs)
    with told(
        f"lr_scheduler_type '{getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)}' cannot be made",
        f"lr_scheduler_kwargs (now {args.lr_scheduler_kwargs or {}}) and warmup_steps",
    ):
        steps = args.max_steps if args.max_steps > 0 else 10**6
        transformers.get_scheduler(
            args.lr_scheduler_type,
            optimizer=torch.optim.SGD([parameter]),
            num_warmup_steps=args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=dict(args.lr_scheduler_kwargs or {}),
        )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, args: AMAConfig, pairs: Dataset) -> None:
    """Raise an `AMAError` for a tokenizer that lacks a special token that DPOTrainer puts to use."""
    name = tokenizer.name_or_path
    if tokenizer.eos_token is None and "chosen" in pairs.column_names and isinstance(pairs[0]["chosen"], str):
        raise AMAError(
            f"The tokenizer of '{name}' has no eos_token, and DPOTrainer ends answers of plain text with it. Set `eos_token` in its "
            "tokenizer_config.json, or give messages, which the chat template ends."
        )
    if (args.pad_token or tokenizer.pad_token or tokenizer.eos_token) is None:
        raise AMAError(
            f"The tokenizer of '{name}' has neither a pad_token nor an eos_token, and batches are padded with one of them. Set "
            "`pad_token` in its tokenizer_config.json."
        )


def _rehearsal_arguments(args: AMAConfig, folder: str) -> AMAConfig:
    own = object.__new__(_RehearsalArguments)
    own.__dict__.update(
        copy.copy(args).__dict__,
        output_dir=folder,
        push_to_hub=False,
        model_init_kwargs=None,  # the model is made with them already
        precompute_ref_log_probs=False,  # for which the weights would be hashed
        dataset_num_proc=None,
        disable_tqdm=True,
    )
    return own


def explained(error: Exception, model: torch.nn.Module | None) -> str | None:
    """The sentence that goes on after an error of another library's: none if it names a key, PEFT's keys if it is PEFT's.

    Args:
        error (`Exception`): What was raised.
        model (`torch.nn.Module`, *optional*): The model.
    """
    names = {field.name for field in dataclasses.fields(AMAConfig)} | {
        "target_modules",
        "target_parameters",
        "modules_to_save",
    }
    return "" if names & set(re.findall(r"\w+", str(error))) else explain_adapter(error, model)


def _run(trainer: DPOTrainer, batch: dict[str, Any]) -> None:
    """Run a batch on tensors that have shapes and no contents; what such a run cannot tell is let pass."""
    left_out = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
    inputs = {key: value for key, value in batch.items() if key not in left_out}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        fill_with_fakes(trainer.model)
        try:
            trainer.model(**inputs, labels=inputs["input_ids"], use_cache=False, fused_lm_head=True)
        except (RuntimeError, ValueError) as error:
            if re.search(r"shape|size of tensor|dimension", str(error)):
                raise
        except (AttributeError, LookupError, AssertionError):
            pass  # a model that decides by numbers what to compute


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """While open, no bars and no reports about weights that are not there."""
    verbosity, bars, data_bars = (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        not are_progress_bars_disabled(),
    )
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        if data_bars:
            enable_progress_bars()
