"""Preference datasets, in whatever form they come, as one dataset with a `task` column."""

from ..common.lazy import lazy_names


__getattr__, __dir__, __all__ = lazy_names(
    __name__, {"TaskConfig": "config", "TaskMixtureConfig": "config", "load_tasks": "loading", "fits_into": "loading"}
)
