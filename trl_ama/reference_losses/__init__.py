"""What base and specialist achieve on each pair: on disk, on the Hub, joined with pairs by id."""

from ..common.lazy import lazy_names


__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "ReferenceLosses": "dataset",
        "load_reference_losses": "loading",
        "join_reference_losses": "columns",
        "read_task": "files",
    },
)
