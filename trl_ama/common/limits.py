"""Which numbers a run can do with: a range for every numeric key of a recipe, ours, TRL's and the Trainer's, with its reason.

A number outside would come to light as another library's traceback in the middle of a run, or never: as a model that has learned
nothing. What DPOTrainer makes sense of is left alone, so `learning_rate: 0` and `max_grad_norm: .inf` pass. Nothing here imports
more than the standard library.
"""

import numbers
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from .errors import AMAError, short


class LimitError(AMAError):
    """A number outside its range; whoever knows better where it was given begins the sentence anew.

    Args:
        where (`str`): Where the value comes from, as the beginning of a sentence.
        key (`str`): The key.
        rest (`str`): What is wrong with it, after the key.
    """

    def __init__(self, where: str, key: str, rest: str):
        super().__init__(f"{where} '{key}' {rest}")
        self.key, self.rest = key, rest

    def told_of(self, where: str) -> "LimitError":
        """The same, of another place."""
        return LimitError(where, self.key, self.rest)


class Limit(NamedTuple):
    """A range of numbers.

    Parameters:
        interval (`str`): As in mathematics, e.g. `"[0, 1)"`; an open end at `inf` takes every finite number.
        why (`str`): Half a sentence for the message.
        given (`dict`): Values of other keys under which the range holds; of a list, one entry is enough.
    """

    interval: str
    why: str
    given: dict[str, Any] = {}

    @property
    def _ends(self) -> list[str]:
        return [end.strip() for end in self.interval[1:-1].split(",")]

    def holds(self, value: numbers.Real) -> bool:
        """Whether a number lies in the range; NaN lies in none."""
        low, high = (_end(text) for text in self._ends)
        if not -sys.float_info.max <= value <= sys.float_info.max:  # also whole numbers of hundreds of digits
            return False
        above = value >= low if self.interval[0] == "[" else value > low
        below = value <= high if self.interval[-1] == "]" else value < high
        return above and below

    def applies(self, values: Mapping[str, Any]) -> bool:
        """Whether the range holds under the values of the other keys."""
        for key, wanted in self.given.items():
            value = values.get(key)
            value = getattr(value, "value", value)  # of an enumeration
            if not (wanted in value if isinstance(value, (list, tuple)) else value == wanted):
                return False
        return True

    def described(self) -> str:
        """The range in words, to follow "must"."""
        low, high = self._ends
        if low == "-inf":
            return "be a finite number"
        if high != "inf":
            return f"lie in {self.interval}"
        return f"be at least {low}" if self.interval[0] == "[" else f"be above {low}"


_PAIR_LOSSES_OF_BETA = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sigmoid_norm",
)  # fmt: skip
_FINITE = "(-inf, inf)"
_BATCH = "a batch has at least one pair"

LIMITS: dict[str, tuple[Limit, ...]] = {
    # ---- The loss ----
    "beta": tuple(
        Limit(
            "(0, inf)",
            "it scales the log-ratios that are compared, and at 0 nothing is learned",
            {"loss_type": name},
        )
        for name in _PAIR_LOSSES_OF_BETA
    ),
    "label_smoothing": (
        Limit("[0, 0.5)", "its loss is divided by 1 - 2 label_smoothing", {"loss_type": "robust"}),
        Limit(
            "(0, 1)",
            "its loss has the logarithms of it and of 1 - label_smoothing; 1e-3 is usual",
            {"loss_type": "exo_pair"},
        ),
    ),
    "discopop_tau": (Limit("(0, inf)", "log-ratios are divided by it", {"loss_type": "discopop"}),),
    "f_alpha_divergence_coef": (Limit(_FINITE, "it is an exponent", {"f_divergence_type": "alpha_divergence"}),),
    "ld_alpha": (Limit(_FINITE, "it weighs log-probs"),),
    "loss_weights": (Limit(_FINITE, "they are summed"),),
    "router_aux_loss_coef": (Limit(_FINITE, "it weighs a loss"),),
    "ref_model_mixup_alpha": (Limit("[0, 1]", "it is a share of the policy's weights", {"sync_ref_model": True}),),
    "ref_model_sync_steps": (Limit("[1, inf)", "it counts steps", {"sync_ref_model": True}),),
    # ---- Optimization ----
    "learning_rate": (Limit("[0, inf)", "weights move by it"),),
    "weight_decay": (Limit("[0, inf)", "below 0 weights would grow"),),
    "adam_beta1": (Limit("[0, 1)", "it is the share of a mean that is kept"),),
    "adam_beta2": (Limit("[0, 1)", "it is the share of a mean that is kept"),),
    "adam_epsilon": (Limit("[0, inf)", "steps are divided by it"),),
    "warmup_steps": (Limit("[0, inf)", "it counts steps, or is a share of them"),),
    "num_train_epochs": (
        Limit(_FINITE, "steps are counted by it"),
        Limit("(0, inf)", "without max_steps nothing would be trained", {"max_steps": -1}),
    ),
    "neftune_noise_alpha": (Limit("[0, inf)", "it is a width of noise"),),
    # ---- Batches ----
    "per_device_train_batch_size": (Limit("[1, inf)", _BATCH),),
    "per_device_eval_batch_size": (Limit("[1, inf)", _BATCH),),
    "precompute_ref_batch_size": (Limit("[0, inf)", "it counts pairs (0: as many as in training)"),),
    "gradient_accumulation_steps": (Limit("[1, inf)", "a step has at least one batch"),),
    "eval_accumulation_steps": (Limit("[1, inf)", "it counts steps"),),
    "max_length": (Limit("[2, inf)", "a sequence of one token has nothing to predict"),),
    "pad_to_multiple_of": (Limit("[1, inf)", "lengths are divided by it"),),
    "streaming_buffer": (Limit("[1, inf)", "it is a number of pairs"),),
    "dataset_num_proc": (Limit("[0, inf)", "it counts processes"),),
    "dataloader_num_workers": (Limit("[0, inf)", "it counts processes"),),
    "dataloader_prefetch_factor": (Limit("[1, inf)", "it counts batches"),),
    # ---- The Trainer ----
    "seed": (Limit("[0, 2**32)", "NumPy takes no other"),),
    "data_seed": (Limit("[0, 2**32)", "NumPy takes no other"),),
    "logging_steps": (Limit(_FINITE, "steps are counted by it"),),
    "eval_steps": (Limit(_FINITE, "steps are counted by it"),),
    "save_steps": (Limit(_FINITE, "steps are counted by it"),),
    "torch_empty_cache_steps": (Limit("[1, inf)", "it counts steps"),),
    "ddp_timeout": (Limit("[1, inf)", "processes wait so many seconds for each other"),),
    "ddp_bucket_cap_mb": (Limit("[0, inf)", "it is a size"),),
    # ---- The mixture ----
    "mixing_lr": (Limit("(0, inf)", "mixture weights move by it"),),
    "smoothing": (Limit("[0, 1]", "it is the share of uniform draws"),),
    # ---- The adapter ----
    "lora_r": (Limit("[1, inf)", "it is a rank"),),
    "lora_alpha": (Limit("(0, inf)", "the adapter's effect is scaled by lora_alpha / lora_r"),),
    "lora_dropout": (Limit("[0, 1)", "it is the share of inputs that is dropped"),),
    # ---- Tasks and commands ----
    "test_split_size": (Limit("(0, 1)", "it is a share"),),
    "max_train_pairs": (Limit("[1, inf)", "it is a number of pairs"),),
    "max_eval_pairs": (Limit("[1, inf)", "it is a number of pairs"),),
    "show": (Limit("[0, inf)", "it is a number of pairs"),),
    "sample": (Limit("[0, inf)", "it is a number of pairs"),),
}

# Numeric keys that a run survives whatever their number is, and why; NaN alone is no number
FREE = {
    "max_steps": "0 and less leave it to num_train_epochs",
    "max_grad_norm": "0 and less clip nothing, and infinity only measures",
    "label_smoothing_factor": "it is for labels of classes, and preference losses have none",
    "eval_delay": "infinity evaluates never",
    "save_total_limit": "0 and less keep all checkpoints",
    "local_rank": "launchers set it",
}


def check_limit(key: str, value: Any, where: str, values: Mapping[str, Any]) -> None:
    """Raise a [`LimitError`] for a number that a run cannot do with; values that are no numbers pass.

    Args:
        key (`str`): The key; without a range, all pass.
        value (`Any`): Its value, or a list of values.
        where (`str`): Begins the message, e.g. `"The config file x.yaml, line 3:"`.
        values (`Mapping`): Values of the other keys, some of which decide what range holds.
    """
    if key not in LIMITS and key not in FREE:
        return
    for number in value if isinstance(value, (list, tuple)) else [value]:
        if not isinstance(number, numbers.Real) or isinstance(number, bool):
            continue
        for limit in LIMITS.get(key, ()):
            if limit.applies(values) and not limit.holds(number):
                finite = (
                    " and finite" if abs(number) > sys.float_info.max and "finite" not in limit.described() else ""
                )
                under = "".join(f" with {name} {_shown(wanted)}" for name, wanted in limit.given.items())
                said = f"must {limit.described()}{finite}{under}, got {short(value)}: {limit.why}."
                raise LimitError(where, key, said)
        if number != number:
            raise LimitError(where, key, "must be a number, got nan.")


def check_limits(values: Mapping[str, Any], where: str) -> None:
    """[`check_limit`] of all keys, each under the values of the others."""
    for key, value in values.items():
        check_limit(key, value, where, values)
    weights = values.get("loss_weights")
    if isinstance(weights, (list, tuple)) and weights and not any(weights):
        raise LimitError(
            where, "loss_weights", f"must not all be 0, got {short(weights)}: there would be nothing to learn."
        )


def _end(text: str) -> float:
    base, _, power = text.partition("**")
    return float(base) ** int(power or 1)


def _shown(value: Any) -> str:
    return f"'{value}'" if isinstance(value, str) else str(value).lower()
