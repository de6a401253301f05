"""`trl ama-plan`: what a run will need, from a model's configuration alone."""

from ..common.lazy import lazy_names


__getattr__, __dir__, __all__ = lazy_names(__name__, {"make_plan": "plan"})
