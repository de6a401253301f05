"""Base models and adapters: where they come from, whether they fit, and how they are switched on one base."""

from ..common.lazy import lazy_names


__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "trained_policy": "switching",
        "PolicySource": "files",
        "check_policy_source": "checks",
        "model_identity": "identity",
    },
)
