"""Draws by task, and the mixture of one run."""

from ..common.lazy import lazy_names


__getattr__, __dir__, __all__ = lazy_names(
    __name__, {"TaskMixtureSampler": "sampler", "TaskStreams": "streams", "Mixture": "mixture"}
)
