"""Parts of any `Trainer`, whatever its objective: mixture, exact resuming, finite steps, evaluation by task."""

from ..common.lazy import lazy_names


__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "ExactResume": "exact_resume",
        "FiniteSteps": "finite_steps",
        "MixedTraining": "mixed",
        "EvaluationByTask": "by_task",
        "Published": "published",
        "TrainingStage": "stage",
    },
)
