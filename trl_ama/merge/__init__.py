"""`trl ama-merge`: an adapter as a full checkpoint, held to what the adapter does."""

from ..common.lazy import lazy_names


__getattr__, __dir__, __all__ = lazy_names(__name__, {"merge_adapter": "merge"})
