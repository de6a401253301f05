"""Per-pair preference losses: pure functions of the four sequence log-probs.

TRL's `DPOTrainer` averages inside its loss and shows no per-pair value, while AMA needs each pair's own. The formulas are
those of `DPOTrainer` (TRL 1.16), and a test holds the mean of each against TRL's loss on the same batch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..common.errors import AMAError, nearest
from ..common.limits import check_limits
from ..evaluate_modules.excess_loss import formula


@dataclass
class PairLogProbs:
    """Summed completion log-probs of a batch of preference pairs, in nats.

    Args:
        chosen, rejected (`torch.Tensor`): Under the policy (or a specialist). # (B,)
        ref_chosen, ref_rejected (`torch.Tensor`): Under the reference policy. # (B,)
        chosen_tokens, rejected_tokens (`torch.Tensor`): Completion lengths; `ipo` and `sigmoid_norm` divide by them. # (B,)
    """

    chosen: torch.Tensor
    rejected: torch.Tensor
    ref_chosen: torch.Tensor
    ref_rejected: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor

    @property
    def chosen_logratios(self) -> torch.Tensor:  # (B,)
        return self.chosen - self.ref_chosen

    @property
    def rejected_logratios(self) -> torch.Tensor:  # (B,)
        return self.rejected - self.ref_rejected


@dataclass
class PreferenceLossConfig:
    """The fields of `DPOConfig` that decide a pair's loss; see there for their meaning."""

    loss_type: list[str]
    loss_weights: list[float] | None = None
    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05

    def __post_init__(self):
        # Some of them may be 0, of a loss whose other parts no pair has by itself
        check_limits({**vars(self), "loss_weights": None}, "Of PreferenceLossConfig,")
        check_loss_types(self.loss_type, self.label_smoothing)
        self.loss_weights = self.loss_weights or [1.0] * len(self.loss_type)

    @classmethod
    def from_args(cls, args) -> "PreferenceLossConfig":
        """Take the fields from a `DPOConfig`."""
        return cls(**{name: getattr(args, name) for name in cls.__dataclass_fields__})

    @classmethod
    def of_pairs(cls, args) -> "PreferenceLossConfig":
        """The part of a `DPOConfig`'s loss that each pair has by itself: without those of `BATCH_LOSSES`, maybe nothing."""
        weights = args.loss_weights or [1.0] * len(args.loss_type)
        kept = [
            (kind, weight) for kind, weight in zip(args.loss_type, weights, strict=True) if kind not in BATCH_LOSSES
        ]
        fields = {name: getattr(args, name) for name in cls.__dataclass_fields__}
        return cls(
            **{**fields, "loss_type": [kind for kind, _ in kept], "loss_weights": [weight for _, weight in kept]}
        )


def sequence_logps(
    per_token_logps: torch.Tensor, completion_mask: torch.Tensor, ld_alpha: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum per-token log-probs over each completion, in float32.

    Args:
        per_token_logps (`torch.Tensor`): Zero outside the completions; chosen rows first. # (2B, L-1)
        completion_mask (`torch.Tensor`): 1 on completion tokens. # (2B, L)
        ld_alpha (`float`, *optional*): LD-DPO's α (arXiv 2409.06411): weight of the tokens beyond the length that both
            completions share.

    Returns:
        `tuple` of chosen and rejected log-probs, in nats. # (B,), (B,)
    """
    mask = completion_mask[:, 1:]
    logps = per_token_logps[:, -mask.size(1) :]  # prompt-learning PEFT prepends virtual tokens
    logps = logps.to(
        mask.device, torch.float32
    )  # of a model that is spread over devices, they are where the LM head is
    if ld_alpha is not None:
        position = mask.cumsum(dim=1)
        lengths = mask.sum(dim=1)
        shared = torch.minimum(*lengths.chunk(2)).repeat(2).unsqueeze(1)
        logps = logps * torch.where(position <= shared, 1.0, ld_alpha)
    chosen, rejected = (logps * mask).sum(dim=1).chunk(2)
    return chosen, rejected


def _f_divergence_scores(logratios: torch.Tensor, config: PreferenceLossConfig) -> torch.Tensor:
    """f'(π/π_ref) of f-DPO (arXiv 2309.16240), up to a constant. # (B,)"""
    kind, alpha = config.f_divergence_type, config.f_alpha_divergence_coef
    if kind == "reverse_kl" or (kind == "alpha_divergence" and abs(alpha - 1.0) < 1e-6):
        return logratios
    if kind == "forward_kl":
        return 1 - torch.exp(-logratios)
    if kind == "js_divergence":
        return math.log(2) + F.logsigmoid(logratios)
    if kind == "alpha_divergence":
        exponent = torch.clamp((alpha - 1.0) * logratios, max=80.0)  # keeps exp(.) finite in float32
        return (torch.exp(exponent) - 1.0) / (alpha - 1.0)
    raise AMAError(
        f"Unknown f_divergence_type '{kind}'; known are 'reverse_kl', 'forward_kl', 'js_divergence' and "
        "'alpha_divergence'."
    )


def _margin(pair: PairLogProbs, config: PreferenceLossConfig) -> torch.Tensor:  # (B,)
    return _f_divergence_scores(pair.chosen_logratios, config) - _f_divergence_scores(pair.rejected_logratios, config)


def _mean_token_margin(pair: PairLogProbs, config: PreferenceLossConfig) -> torch.Tensor:  # (B,)
    chosen = _f_divergence_scores(pair.chosen_logratios, config) / pair.chosen_tokens.clamp(min=1)
    rejected = _f_divergence_scores(pair.rejected_logratios, config) / pair.rejected_tokens.clamp(min=1)
    return chosen - rejected


def _sigmoid(pair, config):
    """DPO, arXiv 2305.18290, Eq. 7."""
    return -F.logsigmoid(config.beta * _margin(pair, config))


def _hinge(pair, config):
    """SLiC, arXiv 2305.10425."""
    return torch.relu(1 - config.beta * _margin(pair, config))


def _ipo(pair, config):
    """IPO, arXiv 2310.12036, Eq. 17, on mean token log-ratios."""
    return (_mean_token_margin(pair, config) - 1 / (2 * config.beta)) ** 2


def _exo_pair(pair, config):
    """EXO, arXiv 2402.00856, Eq. 16."""
    logits = config.beta * _margin(pair, config)
    log_chosen, log_rejected = math.log1p(-config.label_smoothing), math.log(config.label_smoothing)
    return torch.sigmoid(logits) * (F.logsigmoid(logits) - log_chosen) + torch.sigmoid(-logits) * (
        F.logsigmoid(-logits) - log_rejected
    )


def _nca_pair(pair, config):
    """NCA, arXiv 2402.05369."""
    chosen, rejected = config.beta * pair.chosen_logratios, config.beta * pair.rejected_logratios
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def _robust(pair, config):
    """Robust DPO, arXiv 2403.00409."""
    logits, flipped = config.beta * _margin(pair, config), config.label_smoothing
    return (-(1 - flipped) * F.logsigmoid(logits) + flipped * F.logsigmoid(-logits)) / (1 - 2 * flipped)


def _bco_pair(pair, config):
    """BCO, arXiv 2404.04656, as TRL's pairwise variant."""
    return -F.logsigmoid(config.beta * pair.chosen_logratios) - F.logsigmoid(-config.beta * pair.rejected_logratios)


def _sppo_hard(pair, config):
    """SPPO, arXiv 2405.00675, Eq. 4.7 with a sure winner."""
    target = 0.5 / config.beta
    return (pair.chosen_logratios - target) ** 2 + (pair.rejected_logratios + target) ** 2


def _apo_zero(pair, config):
    """APO-zero, arXiv 2408.06266, Eq. 7."""
    chosen, rejected = config.beta * pair.chosen_logratios, config.beta * pair.rejected_logratios
    return 1 - torch.sigmoid(chosen) + torch.sigmoid(rejected)


def _apo_down(pair, config):
    """APO-down, arXiv 2408.06266, Eq. 8."""
    chosen = config.beta * pair.chosen_logratios
    margin = config.beta * (pair.chosen_logratios - pair.rejected_logratios)
    return torch.sigmoid(chosen) + 1 - torch.sigmoid(margin)


def _discopop(pair, config):
    """DiscoPOP, arXiv 2406.08414, Eq. 5."""
    logits = config.beta * _margin(pair, config)
    modulation = torch.sigmoid(logits / config.discopop_tau)
    return -F.logsigmoid(logits) * (1 - modulation) + torch.exp(-logits) * modulation


def _sigmoid_norm(pair, config):
    """DPO on mean token log-ratios (Tülu 3, arXiv 2411.15124)."""
    return -F.logsigmoid(config.beta * _mean_token_margin(pair, config))


PAIR_LOSSES: dict[str, Callable[[PairLogProbs, PreferenceLossConfig], torch.Tensor]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sigmoid_norm": _sigmoid_norm,
}

# TRL's losses that mix the pairs of a batch, and why a pair has no loss of its own under them
BATCH_LOSSES = {
    "aot": "it sorts log-ratios across the batch",
    "aot_unpaired": "it sorts log-ratios across the batch",
    "sft": "it averages over the batch's tokens",
}


def check_loss_types(loss_types: list[str], label_smoothing: float = 0.0, of_pairs: bool = True) -> None:
    """Raise an `AMAError` for an unknown loss type, one that lacks its label smoothing, or, with `of_pairs`, one under which a
    single pair has no loss."""
    for loss_type in loss_types:
        if loss_type in BATCH_LOSSES:
            if not of_pairs:
                continue
            raise AMAError(
                f"loss_type '{loss_type}' has no per-pair meaning ({BATCH_LOSSES[loss_type]}), which excess losses "
                f"need. Use one of {sorted(PAIR_LOSSES)}; or mixing='proportional' or 'uniform' without reference losses, which "
                "need none; or DPOTrainer."
            )
        if loss_type not in PAIR_LOSSES:
            raise AMAError(
                f"Unknown loss_type '{loss_type}'; known are {sorted(PAIR_LOSSES)}."
                f"{nearest(loss_type, list(PAIR_LOSSES))}"
            )
        if loss_type == "exo_pair" and not label_smoothing > 0:
            raise AMAError(
                f"loss_type 'exo_pair' needs label_smoothing above 0, got {label_smoothing}; 1e-3 is usual."
            )


def pair_losses(pair: PairLogProbs, config: PreferenceLossConfig) -> torch.Tensor:
    """The preference loss L(θ, z) of each pair: the weighted sum over `loss_type`, in nats for the logistic ones. # (B,)"""
    losses = [
        weight * PAIR_LOSSES[loss_type](pair, config)
        for loss_type, weight in zip(config.loss_type, config.loss_weights, strict=True)
    ]
    # A pair without a loss of its own may still be one that gives no finite number
    return sum(losses) if losses else 0 * (pair.chosen - pair.rejected)


def excess_losses(losses: torch.Tensor, reference_losses: torch.Tensor, excess_clip: str) -> torch.Tensor:
    """Excess e(θ, z) over the reference losses ℓ*(z), clipped at zero per pair under `excess_clip="pair"`. # (B,)"""
    return formula.excess_losses(losses, reference_losses, clip=excess_clip == "pair")


def untrained_loss(config: PreferenceLossConfig) -> float:
    """Loss of a pair while policy and reference are the same: ln 2 for DPO, whatever β is."""
    zero, one = torch.zeros(1), torch.ones(1)
    return pair_losses(PairLogProbs(zero, zero, zero, zero, one, one), config).item()
