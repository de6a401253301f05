import copy
from dataclasses import dataclass, field
from typing import Any

from trl import DPOConfig

from ..common.errors import AMAError, short
from ..common.limits import LIMITS, check_limits
from ..common.secrets import is_secret
from ..common.value_types import check_value
from ..mixing import STRATEGIES, check_strategy_name
from .losses import check_loss_types


_EXCESS_CLIPS = ("pair", "task", "none")
_SAMPLINGS = ("uniform", "proportional")
# What says how tasks are mixed, and decides nothing of a training without a mixture
MIXING_FIELDS = ("mixing", "mixing_lr", "smoothing", "excess_clip", "sampling")
# Fields that our code computes with; in Python nothing has looked at their types
_CHECKED = (
    *MIXING_FIELDS, "max_length", "truncation_mode", "seed", "data_seed",
    "metric_for_best_model", "streaming_buffer",
)  # fmt: skip
# Fields that are a number or a word, and convert a number that is text
_TEXT_OR_NUMBER = ("mixing_lr", "pad_to_multiple_of")


@dataclass
class AMAConfig(DPOConfig):
    r"""
    Configuration class for the [`AMATrainer`].

    This class includes only the parameters that are specific to AutoMixAlign. For the others, see [`~trl.DPOConfig`] and
    [`~transformers.TrainingArguments`]; all of them work here.

    Parameters:
        mixing (`str`, *optional*, defaults to `"ama_s"`):
            How tasks are mixed. `"ama_s"` adapts how often a task is drawn, `"ama_r"` how much its pairs count (both
            AutoMixAlign); `"proportional"` (concatenate everything), `"uniform"` (every task equally often) and
            `"task_normalized"` (draw proportionally, count every task equally) are fixed.
        mixing_lr (`float` or `str`, *optional*, defaults to `"auto"`):
            Step size η of the mixture weights, per nat of excess loss. `"auto"` takes it from the regret bound:
            √(2 ln k / (T k)) for `ama_s` and √(2 ln k / T) for `ama_r`, with k tasks and T optimizer steps, divided by
            the excess of an untrained policy (ln 2 for DPO).
        smoothing (`float`, *optional*, defaults to `0.1`):
            Share c of uniform draws in `ama_s`, in [0, 1]: no task is drawn with a probability below c / k.
        excess_clip (`str`, *optional*, defaults to `"pair"`):
            Where excess losses are clipped at zero. `"pair"`: a pair on which the policy matches its specialist sends no
            gradient (the paper). `"task"`: a task whose mean excess is not positive sends none. `"none"`: nowhere.
        sampling (`str`, *optional*, defaults to `"uniform"`):
            The fixed draws of `ama_r`: `"uniform"` or `"proportional"`.
        specialists (`dict[str, str]`, *optional*):
            Task → adapter or model (local folder, or Hub id with an optional `@revision`). Their losses are computed
            before training if the dataset has no `specialist_*_logps` columns. Without either, adaptive mixing is plain
            worst-case DPO.
        prefix_sharing (`str` or `bool`, *optional*, defaults to `"auto"`):
            Whether prompt, chosen and rejected run through the model as one sequence, which computes each prompt once and
            pads nothing. `"auto"`: where it gives the same numbers, which is tried on every model, and is no slower, by a
            rule from shapes and the device. `True`: wherever it gives the same numbers, slower or not, with an error where
            it does not. `False`: never.
        skip_clipped (`str` or `bool`, *optional*, defaults to `"auto"`):
            Whether pairs that `excess_clip="pair"` has clipped, which send no gradient, are left out of the backward pass: the
            batch runs forward without a graph, then the other pairs run again with one. The numbers are the same, to rounding.
            `"auto"`: while so many pairs were clipped lately that it is faster. `True`: always, where it gives the same numbers.
            `False`: never.
        streaming_buffer (`int`, *optional*, defaults to `1000`):
            Pairs of a task that are held and shuffled at a time if the task is streamed. A task that has no more is drawn as if
            it were in memory.
        save_on_signal (`bool`, *optional*, defaults to `True`):
            Whether SIGTERM and the first Ctrl-C save a checkpoint at the end of the optimizer step and then leave with exit code
            75; a second Ctrl-C stops at once. Nothing is saved if `save_strategy` is `"no"`. Off, signals do what they do in
            [`~trl.DPOTrainer`].
    """

    _VALID_DICT_FIELDS = DPOConfig._VALID_DICT_FIELDS + ["specialists"]

    mixing: str = field(
        default="ama_s",
        metadata={
            "help": "How tasks are mixed: `ama_s` (adaptive draws), `ama_r` (adaptive weights), `proportional`, "
            "`uniform` or `task_normalized`."
        },
    )
    # The command line passes the value as a string
    mixing_lr: float | str | None = field(
        default="auto",
        metadata={
            "help": "Step size of the mixture weights, per nat of excess loss: a positive number, or `auto` for the "
            "regret bound's."
        },
    )
    smoothing: float = field(
        default=0.1,
        metadata={"help": "Share c of uniform draws in `ama_s`: no task is drawn with a probability below c / k."},
    )
    excess_clip: str = field(
        default="pair",
        metadata={
            "help": "Where excess losses are clipped at zero: per `pair`, per `task`, or `none`.",
            "choices": list(_EXCESS_CLIPS),
        },
    )
    sampling: str = field(
        default="uniform",
        metadata={"help": "The fixed draws of `ama_r`: `uniform` or `proportional`.", "choices": list(_SAMPLINGS)},
    )
    specialists: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Task to adapter or model (local folder or Hub id). Their losses are computed before training if "
            "the dataset does not carry them."
        },
    )
    # The command line and YAML pass strings or booleans
    prefix_sharing: str = field(
        default="auto",
        metadata={
            "help": "Run prompt, chosen and rejected through the model as one sequence: `auto` (where it gives the same "
            "numbers and is no slower), `true` (insist) or `false`."
        },
    )
    skip_clipped: str = field(
        default="auto",
        metadata={
            "help": "Leave clipped pairs, which send no gradient, out of the backward pass: `auto` (while so many were clipped "
            "lately that it is faster), `true` (always, where it gives the same numbers) or `false`."
        },
    )
    streaming_buffer: int = field(
        default=1000,
        metadata={"help": "Pairs of a task that are held and shuffled at a time if the task is streamed."},
    )
    save_on_signal: bool = field(
        default=True,
        metadata={
            "help": "Save a checkpoint on SIGTERM and on the first Ctrl-C, and leave with exit code 75; a second Ctrl-C stops at "
            "once."
        },
    )

    @property
    def mixing_options(self) -> dict[str, Any]:
        """How tasks are mixed, as [`trl_ama.mixing.build_strategy`] and its callers take it."""
        return {name: getattr(self, name) for name in MIXING_FIELDS}

    def __repr__(self) -> str:
        # TRL's masks `hub_token`; a dataclass's own would show it
        clone = copy.copy(self)
        clone.model_init_kwargs = _without_tokens(self.model_init_kwargs)
        return DPOConfig.__str__(clone)

    __str__ = __repr__

    def to_dict(self) -> dict[str, Any]:
        # Trackers write this as JSON: no secrets, and a specialist may be a loaded model
        values = super().to_dict()
        values["model_init_kwargs"] = _without_tokens(values.get("model_init_kwargs"))
        if isinstance(values.get("specialists"), dict):
            values["specialists"] = {
                task: source if isinstance(source, str) else type(source).__name__
                for task, source in values["specialists"].items()
            }
        return values

    def __getstate__(self) -> dict[str, Any]:
        # The Trainer pickles its arguments into `training_args.bin`, which it pushes to the Hub. No token goes there
        return {**self.__dict__, "hub_token": None, "model_init_kwargs": _without_tokens(self.model_init_kwargs)}

    def __copy__(self) -> "AMAConfig":
        clone = object.__new__(type(self))
        clone.__dict__.update(self.__dict__)
        return clone

    def __deepcopy__(self, memo: dict[int, Any]) -> "AMAConfig":
        clone = object.__new__(type(self))
        memo[id(self)] = clone
        clone.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return clone

    def __post_init__(self):
        for name in _CHECKED:
            check_value(AMAConfig, name, getattr(self, name), "Of AMAConfig,", parses_text=False)
        self.mixing_lr = _parse_mixing_lr(self.mixing_lr)
        for name in LIMITS:
            if isinstance(getattr(self, name, None), str) and name not in _TEXT_OR_NUMBER:
                check_value(AMAConfig, name, getattr(self, name), "Of AMAConfig,", parses_text=False)
        check_limits(vars(self), "Of AMAConfig,")
        super().__post_init__()
        check_strategy_name(self.mixing)
        plain = STRATEGIES[self.mixing].plain_loss and not self.specialists
        check_loss_types(self.loss_type, self.label_smoothing, of_pairs=not plain)
        self.prefix_sharing = _parse_switch("prefix_sharing", self.prefix_sharing)
        self.skip_clipped = _parse_switch("skip_clipped", self.skip_clipped)
        # The command line checks `choices` itself; YAML and Python come here
        for name, known in (("excess_clip", _EXCESS_CLIPS), ("sampling", _SAMPLINGS)):
            if getattr(self, name) not in known:
                raise AMAError(f"{name} must be one of {list(known)}, got {getattr(self, name)!r}.")
        if self.specialists is not None and not isinstance(self.specialists, dict):
            raise AMAError(
                f"specialists maps each task to its adapter, got {short(self.specialists)}. Write it as "
                '{"helpful": "path/or/hub-id", …}.'
            )


# Pickled arguments name the class by its public place, which stays where it is
AMAConfig.__module__ = "trl_ama"


def _without_tokens(kwargs: dict[str, Any] | None) -> dict[str, Any] | None:
    return kwargs and {key: value for key, value in kwargs.items() if not is_secret(key)}


def _parse_mixing_lr(value: float | str | None) -> float | str:
    if value is None or value == "auto":
        return "auto"
    try:
        number = float(value)
    except ValueError:
        raise AMAError(f"mixing_lr must be 'auto' or a positive number, got {value!r}.") from None
    if not 0.0 < number < float("inf"):
        raise AMAError(f"mixing_lr must be 'auto' or a positive number, got {value!r}.")
    return number


def _parse_switch(name: str, value: str | bool) -> str | bool:
    known = {"auto": "auto", "true": True, "false": False}
    if str(value).lower() not in known:
        raise AMAError(f"{name} must be 'auto', True or False, got {value!r}.")
    return known[str(value).lower()]
