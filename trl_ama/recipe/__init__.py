"""What a user wrote, checked, and what follows from it: arguments, settings, fingerprints."""

from ..common.lazy import lazy_names


__getattr__, __dir__, __all__ = lazy_names(__name__, {"RunSettings": "settings", "PipelineArguments": "arguments"})
