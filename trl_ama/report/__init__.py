"""Text for people out of plain values and files: table, plot, page, parts of cards; never torch."""

from ..common.lazy import lazy_names


__getattr__, __dir__, __all__ = lazy_names(__name__, {"write_page": "page", "write_comparison": "page"})
