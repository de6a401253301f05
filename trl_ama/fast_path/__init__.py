"""A pair in one forward pass, where that is exact: each prompt once, nothing padded."""

from ..common.lazy import lazy_names


__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {"PackedPairs": "packing", "pack_pairs": "packing", "packed_forward": "forward", "PrefixSharing": "choice"},
)
