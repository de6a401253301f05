"""`trl ama-check`: the pairs of a recipe as the model sees them, and what may be wrong with them."""

from ..common.lazy import lazy_names


__getattr__, __dir__, __all__ = lazy_names(__name__, {"check_data": "check"})
