"""Pairs about images: in the columns that `DPOTrainer` reads, `images` (a list) or `image`, as datasets' `Image`."""

from typing import Any

from .tasks import IMAGE_COLUMNS


def has_images(dataset: Any) -> bool:
    """Whether `DPOTrainer` takes these pairs for pairs about images; it then tokenises them batch by batch."""
    return any(column in (dataset.column_names or ()) for column in IMAGE_COLUMNS)
