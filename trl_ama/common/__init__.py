"""What knows nothing of tasks or training: errors, safe files, versions, secrets, processes, signals, the Hub."""

from .lazy import lazy_names


__getattr__, __dir__, __all__ = lazy_names(__name__, {"AMAError": "errors", "Interrupted": "interruption"})
