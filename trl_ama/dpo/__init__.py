"""The objective of pairs: losses, scoring, `AMAConfig` and `AMATrainer`."""

from ..common.lazy import lazy_names


__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "AMAConfig": "config",
        "AMATrainer": "ama_trainer",
        "PairTrainer": "pair_trainer",
        "SpecialistTrainer": "pair_trainer",
        "pair_losses": "losses",
        "excess_losses": "losses",
        "score_pairs": "scoring",
    },
)
