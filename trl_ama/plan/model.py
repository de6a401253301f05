"""The base model of a plan: what of a recipe decides its memory and its work, read from its configuration alone."""

from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from transformers import AutoConfig, BitsAndBytesConfig, PretrainedConfig
from trl import get_peft_config

from ..common.errors import AMAError, sentence
from ..dpo.config import AMAConfig
from ..fast_path.attention import knows_attention
from ..fast_path.rules import broken_rule, unknown_attention
from ..recipe.recipe import Recipe
from .cost import Products
from .empty_model import MemorySettings, empty_model
from .lengths import Pair
from .memory import StageMemory, Trials, scoring_memory, training_memory, why_not_packed


class PlannedModel:
    """The base model without weights, as a recipe trains it on a device.

    Args:
        recipe ([`Recipe`]): The parsed recipe.
        device (`str`): `"cuda"` or `"cpu"`.
        distributed (`bool`): Whether several processes average gradients by DistributedDataParallel.

    Raises:
        AMAError: From any property, if the configuration cannot be read or the settings do not go together.
    """

    def __init__(self, recipe: Recipe, device: str, distributed: bool):
        self.recipe, self.device, self.distributed = recipe, device, distributed
        self.args = recipe.training_args
        self.peft_config = get_peft_config(recipe.model_args)
        self._memories: dict[Any, StageMemory] = {}
        self._trials: Trials = {}

    @cached_property
    def config(self) -> PretrainedConfig:
        """The base model's."""
        init = self.args.model_init_kwargs
        try:
            return AutoConfig.from_pretrained(
                self.recipe.model_name, revision=init.get("revision"), trust_remote_code=self.args.trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise AMAError(
                f"The configuration of '{self.recipe.model_name}' cannot be read: {sentence(error)} Check model_name_or_path."
            ) from error

    @cached_property
    def quantization(self) -> BitsAndBytesConfig | None:
        """The recipe's, or the one that the weights are stored in."""
        stored = getattr(self.config, "quantization_config", None)
        try:
            asked = self.recipe.quantization_config()
            if asked is not None or stored is None:
                return asked
            stored = stored if isinstance(stored, dict) else stored.to_dict()
            if "bitsandbytes" in str(stored.get("quant_method")):
                return BitsAndBytesConfig.from_dict(stored)
        except (ImportError, ValueError, TypeError) as error:
            raise AMAError(f"The quantisation cannot be planned: {sentence(error)} Install bitsandbytes.") from error
        raise AMAError(
            f"The weights of '{self.recipe.model_name}' are stored as '{stored.get('quant_method')}', and a plan knows bitsandbytes "
            "alone. Plan the model that they were made from, with load_in_4bit or load_in_8bit."
        )

    def memory_settings(self, args: AMAConfig) -> MemorySettings:
        """What of the training arguments decides memory."""
        init = args.model_init_kwargs
        dtype = init.get("dtype", "float32")
        if dtype == "auto":
            dtype = getattr(self.config, "dtype", None) or torch.float32
        return MemorySettings(
            dtype=dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype),
            autocast=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
            quantization=self.quantization,
            peft_config=self.peft_config,
            attention=init.get("attn_implementation"),
            gradient_checkpointing=args.gradient_checkpointing,
            optim=str(getattr(args.optim, "value", args.optim)),
            accumulates=args.gradient_accumulation_steps > 1,
            distributed=self.distributed,
            device=self.device,
        )

    @cached_property
    def empty(self) -> torch.nn.Module:
        """The model without weights, to be counted and never run."""
        return empty_model(self.config, self.memory_settings(self.args))

    @property
    def is_full(self) -> bool:
        """Whether all weights are trained, so that base and trained policy are two models."""
        return self.peft_config is None

    @cached_property
    def products(self) -> Products:
        """Multiplications that a token takes."""
        return Products.of(self.empty, self.is_full, self.device)

    @cached_property
    def why_plain(self) -> str | None:
        """Why the fast path is not taken, if it is not: by the rules, and by a look at which layers know packed rows."""
        settings = self.memory_settings(self.args)
        if self.args.prefix_sharing is False:
            return "prefix_sharing is off"
        if settings.attention is not None and not knows_attention(settings.attention):
            return unknown_attention(settings.attention)
        reason = broken_rule(self.empty, self.args)
        return why_not_packed(self.config, settings) if reason is None else reason

    @property
    def packs(self) -> bool:
        """Whether pairs run as packed rows."""
        return self.why_plain is None

    def memory(
        self,
        trains: bool,
        args: AMAConfig,
        pairs: list[Pair],
        common: int,
        second: bool,
        packed: bool = True,
        **changes: Any,
    ) -> StageMemory:
        """Memory of a training or a sweep whose largest batch is this; see [`training_memory`] and [`scoring_memory`].

        Args:
            trains (`bool`): Whether it is a training.
            args ([`AMAConfig`]): The stage's training arguments.
            pairs, common: The batch.
            second (`bool`): Whether another whole model is in memory.
            packed (`bool`): Whether packed rows are asked for; they are not taken where the model does not allow them.
            changes: Of [`MemorySettings`].
        """
        packed = packed and self.packs
        settings = replace(self.memory_settings(args), **changes)
        if not trains:  # two sweeps that differ in what only a training knows are the same
            settings = replace(settings, gradient_checkpointing=False, accumulates=False, distributed=False)
        common = common if packed and len(pairs) > 1 else 0
        key = (trains, settings, tuple(pairs), common, second, packed, args.max_length)
        if key not in self._memories:
            function = training_memory if trains else scoring_memory
            self._memories[key] = function(
                self.config, settings, pairs, packed, second, args.max_length, common, self._trials
            )
        return self._memories[key]
