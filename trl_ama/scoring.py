"""Sequence log-probs of preference pairs under one base model, with adapters switched and never copied."""

import contextlib
import gc
import json
import os
from collections.abc import Iterator

import numpy as np
import torch
from accelerate.utils import is_peft_model, tqdm
from datasets import Dataset
from peft import PeftModel
from transformers import AutoConfig, PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file
from trl import DPOTrainer
from trl.trainer.utils import add_fused_lm_head, create_model_from_path, get_config_model_id, use_adapter

from .errors import AMAError, first_line
from .preference_losses import sequence_logps


_ADAPTER = "specialist"
_NOT_FOR_THE_MODEL = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")


class ScoringTrainer(DPOTrainer):
    """A `DPOTrainer` that only scores: everything but training (loading, tokenisation, device, precision) is TRL's.

    Its whole difference: no second model is loaded and nothing is computed for the reference.
    """

    def _precompute_ref_logps(self, dataset, name, batch_size):
        return dataset


def split_revision(source: str) -> tuple[str, str | None]:
    """Split `org/name@revision` into its parts; a local folder is left whole."""
    if os.path.isdir(source) or "@" not in source:
        return source, None
    name, revision = source.rsplit("@", 1)
    return name, revision


@contextlib.contextmanager
def reference_policy(trainer: DPOTrainer) -> Iterator[torch.nn.Module]:
    """The reference policy that `DPOTrainer` would use: a reference model, the `ref` adapter, or no adapter at all."""
    if trainer.ref_model is not None:
        yield trainer.ref_model
    elif is_peft_model(trainer.model):
        with use_adapter(trainer.model, "ref" if "ref" in trainer.model.peft_config else None):
            yield trainer.model
    else:
        yield trainer.model


@contextlib.contextmanager
def trained_policy(
    trainer: DPOTrainer, who: str, source: "str | PreTrainedModel | PeftModel"
) -> Iterator[torch.nn.Module]:
    """A policy trained from the trainer's base model (a specialist, a generalist), for the time of the context.

    Args:
        trainer (`DPOTrainer`): Holds the base model; if `source` is an adapter, it is put on that model and taken off
            again.
        who (`str`): For messages, e.g. `"the specialist of task 'code'"`.
        source: Adapter or model folder, Hub id with an optional `@revision`, or a loaded model.

    Raises:
        AMAError: If the policy belongs to another base model or cannot be read.
    """
    if not isinstance(source, str):
        _check_vocabulary(trainer, who, source)
        add_fused_lm_head(source.get_base_model() if is_peft_model(source) else source)
        yield source.to(trainer.accelerator.device)
        return
    name, revision = split_revision(source)
    if not check_policy_source(get_config_model_id(trainer.model.config), who, source):
        with _full_model(trainer, who, name, revision) as model:
            yield model
        return
    with _adapter(trainer, name, revision) as model:
        yield model


@contextlib.contextmanager
def _adapter(trainer: DPOTrainer, name: str, revision: str | None) -> Iterator[torch.nn.Module]:
    model = trainer.model
    if is_peft_model(model):
        model.load_adapter(name, adapter_name=_ADAPTER, revision=revision)
        try:
            with use_adapter(model, _ADAPTER):
                yield model
        finally:
            model.delete_adapter(_ADAPTER)
        return
    # PEFT freezes the base that it is put on; full fine-tuning needs it trainable again
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    wrapped = PeftModel.from_pretrained(model, name, adapter_name=_ADAPTER, revision=revision)
    wrapped.to(trainer.accelerator.device)
    try:
        yield wrapped
    finally:
        wrapped.unload()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])


@contextlib.contextmanager
def _full_model(trainer: DPOTrainer, who: str, name: str, revision: str | None) -> Iterator[torch.nn.Module]:
    kwargs = {key: value for key, value in (trainer.args.model_init_kwargs or {}).items() if key != "revision"}
    kwargs.setdefault("dtype", trainer.model.dtype)
    model = create_model_from_path(name, revision=revision, **kwargs)
    _check_vocabulary(trainer, who, model)
    add_fused_lm_head(model)
    try:
        yield model.to(trainer.accelerator.device)
    finally:
        del model
        gc.collect()


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def check_policy_source(base_model: str, who: str, source: str) -> bool:
    """Whether `source` is an adapter (of `base_model`), rather than a full model; loads no weights.

    Args:
        base_model (`str`): Path or Hub id of this run's base model.
        who (`str`): For messages, e.g. `"the specialist of task 'code'"`.
        source (`str`): Adapter or model folder, or Hub id with an optional `@revision`.

    Raises:
        AMAError: If it cannot be read, is neither of the two, or is an adapter of another base model.
    """
    name, revision = split_revision(source)
    try:
        adapter_config = find_adapter_config_file(name, revision=revision)
        if adapter_config is None:
            AutoConfig.from_pretrained(name, revision=revision)
            return False
    except (OSError, ValueError) as error:
        raise AMAError(
            f"{_capital(who)} at '{source}' is neither an adapter (no adapter_config.json) nor a model: "
            f"{first_line(error)} Check the path or Hub id."
        ) from error
    with open(adapter_config, encoding="utf-8") as file:
        theirs = json.load(file).get("base_model_name_or_path")
    if not _same_base(base_model, theirs, name):
        raise AMAError(
            f"{_capital(who)} ('{source}') is an adapter of '{theirs}', but this run's base model is '{base_model}'. Use "
            f"one of the same base model, or set model_name_or_path to '{theirs}'. If '{base_model}' is a copy of it, give "
            "the folder the same name."
        )
    return True


def _same_base(ours: str, theirs: str | None, adapter: str) -> bool:
    """Whether two names stand for one base model. Folders move and are copied, so names alone do not say."""
    if not theirs or theirs == ours:
        return True
    if os.path.isdir(theirs) and os.path.isdir(ours) and os.path.samefile(theirs, ours):
        return True
    # A specialist that the pipeline trained notes a hash of its base's weights
    note = os.path.join(adapter, "stage.json")
    if os.path.isdir(ours) and os.path.isfile(note):
        from .fingerprint import model_identity

        with open(note, encoding="utf-8") as file:
            noted = json.load(file)["fingerprint"]["base_model"]
        return noted.rsplit("@", 1)[-1] == model_identity(ours).rsplit("@", 1)[-1]
    local_copy = os.path.isdir(ours) != os.path.isdir(theirs)
    return local_copy and os.path.basename(os.path.abspath(ours)) == os.path.basename(theirs.rstrip("/"))


def _check_vocabulary(trainer: DPOTrainer, who: str, model: PreTrainedModel) -> None:
    theirs = model.get_input_embeddings().weight.shape[0]
    ours = trainer.model.get_input_embeddings().weight.shape[0]
    if theirs != ours:
        raise AMAError(
            f"{_capital(who)} has a vocabulary of {theirs} tokens, this run's base model has {ours}. It must come from the "
            "same base model."
        )


def score_pairs(
    trainer: DPOTrainer, model: torch.nn.Module, dataset: Dataset, description: str
) -> dict[str, np.ndarray]:
    """Summed completion log-probs of every pair, in the dataset's order.

    Args:
        trainer (`DPOTrainer`): Gives the collator, device, precision and `ld_alpha`.
        model (`torch.nn.Module`): A model with TRL's fused LM head.
        dataset (`Dataset`): Pairs as `DPOTrainer` prepares them (`prompt_ids`, `chosen_ids`, `rejected_ids`). # N rows
        description (`str`): For the progress bar.

    Returns:
        `dict` of `chosen_logps`, `rejected_logps` (nats, float32) and `chosen_tokens`, `rejected_tokens`. # (N,) each
    """
    args, accelerator = trainer.args, trainer.accelerator
    columns = dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    lengths = [
        len(p) + max(len(c), len(r)) for p, c, r in zip(*(columns[c] for c in columns.column_names), strict=True)
    ]
    order = np.argsort(lengths, kind="stable")[::-1]  # like with like, longest first: an out-of-memory shows at once
    result = {
        name: np.zeros(len(dataset), dtype=dtype)
        for name, dtype in (
            ("chosen_logps", np.float32),
            ("rejected_logps", np.float32),
            ("chosen_tokens", np.int32),
            ("rejected_tokens", np.int32),
        )
    }
    collator = getattr(trainer.data_collator, "inner", trainer.data_collator)
    batch_size = args.precompute_ref_batch_size or args.per_device_eval_batch_size
    was_training = model.training
    model.eval()
    try:
        for start in tqdm(range(0, len(order), batch_size), desc=description, disable=args.disable_tqdm):
            rows = order[start : start + batch_size]
            inputs = trainer._prepare_inputs(collator([columns[int(row)] for row in rows]))
            completion_mask = inputs["completion_mask"]
            labels = inputs["input_ids"].masked_fill(completion_mask == 0, -100)
            kwargs = {key: value for key, value in inputs.items() if key not in _NOT_FOR_THE_MODEL}
            with torch.no_grad(), accelerator.autocast():
                outputs = model(**kwargs, labels=labels, use_cache=False, fused_lm_head=True)
            chosen, rejected = sequence_logps(outputs.log_probs, completion_mask, args.ld_alpha)
            result["chosen_logps"][rows] = chosen.cpu().numpy()
            result["rejected_logps"][rows] = rejected.cpu().numpy()
            tokens = completion_mask.sum(dim=1).cpu().numpy()
            result["chosen_tokens"][rows], result["rejected_tokens"][rows] = np.split(tokens, 2)
    finally:
        model.train(was_training)
    return result
