"""The stages of a run: specialists, reference losses, generalists, evaluation, cards and the Hub."""

from ..common.lazy import lazy_names


__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "run_pipeline": "run",
        "train_specialist": "specialists",
        "compute_reference_losses": "losses",
        "evaluate_policies": "evaluation",
    },
)
