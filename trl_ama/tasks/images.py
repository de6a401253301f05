"""Pairs about images: in the columns that `DPOTrainer` reads, `images` (a list) or `image`, as datasets' `Image`."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, Image, LargeList, List, Value
from trl import prepare_multimodal_messages

from ..common.arrays import list_lengths
from ..common.errors import AMAError, first_line, short
from .config import TaskConfig


IMAGES, IMAGE = IMAGE_COLUMNS = ("images", "image")
_SIDES = ("prompt", "chosen", "rejected")
_MANY = List(Image())
_AT_ONCE = 100  # rows whose images are in memory
_PATHS = ("string", "large_string")
_BYTES = ("binary", "large_binary")


def has_images(dataset: Any) -> bool:
    """Whether `DPOTrainer` takes these pairs for pairs about images; it then tokenises them batch by batch."""
    columns = getattr(dataset, "column_names", None) or ()  # a user's own Dataset need not have any
    return any(column in columns for column in IMAGE_COLUMNS)


def is_about_images(row: Mapping[str, Any]) -> bool:
    """As [`has_images`], of a row."""
    return any(column in row for column in IMAGE_COLUMNS)


def images_of(row: Mapping[str, Any]) -> list[Any]:
    """A row's images in their order; none if it has no such column."""
    if row.get(IMAGE) is not None:
        return [row[IMAGE]]
    return list(row.get(IMAGES) or ())


def image_identity(image: Any) -> str:
    """A hash of what is to be seen, so that an image is the same one as a file, as bytes, in memory, as PNG or as TIFF.

    Args:
        image: What a row of a dataset gives (a PIL image), or what datasets' `Image` takes.
    """
    import PIL.Image  # here, because it is optional: pairs without images need none

    if isinstance(
        image, dict
    ):  # not by `encode_example`, which prefers a file of that name, if there happens to be one
        image = Image().decode_example(image)
    elif not isinstance(image, PIL.Image.Image):
        image = Image().decode_example(Image().encode_example(image))
    if image.mode == "P":  # numbers of colours in a palette, of which there may be several for the same colours
        image = image.convert("RGBA")
    width, height = image.size
    return hashlib.sha256(f"{image.mode} {width} {height} ".encode() + image.tobytes()).hexdigest()[:24]


# ---- Reading ----


def image_folders(task: TaskConfig, tasks_dir: str | None) -> list[Path] | None:
    """Where the paths of a task's images may start; `None` if its pairs are not from files of this machine."""
    if tasks_dir is not None:
        return [Path(tasks_dir)]
    folder, files = Path(task.path or ""), list(_names(task.data_files))
    if any("://" in name for name in files) or not (folder.is_dir() or files):
        return None
    if folder.is_dir():
        return [folder / (task.data_dir or ""), *((folder / name).parent for name in files)]
    return [Path(name).parent for name in files] if all(map(_is_local, files)) else None


def _is_local(name: str) -> bool:
    return Path(name).parent.is_dir()


def _names(data_files: Any) -> Iterator[str]:
    if isinstance(data_files, dict):
        data_files = list(data_files.values())
    for entry in data_files if isinstance(data_files, (list, tuple)) else [data_files]:
        if isinstance(entry, (dict, list, tuple)):
            yield from _names(entry)
        elif entry is not None:
            yield str(entry)


def read_images(dataset: Dataset, task: str, split: str, folders: Sequence[Path] | None) -> Dataset:
    """Pairs whose images, if they have any, are datasets' `Image`; in a column `images` if some have none.

    Args:
        dataset (`Dataset`): Pairs with a column of images, paths of files, bytes or `{bytes, path}`, one each or lists.
        task, split (`str`): For messages.
        folders (`Sequence[Path]`, *optional*): Where paths may start, beside the working directory; `None` if the pairs are from
            somewhere that must not name files of this machine.

    Raises:
        AMAError: If a column holds something else, or a row names an image that is not there.
    """
    columns = [column for column in IMAGE_COLUMNS if column in dataset.column_names]
    if not columns:
        return dataset
    if len(columns) > 1:
        raise AMAError(
            f"Task '{task}' has both columns '{IMAGES}' and '{IMAGE}', and a pair's images are in one of them. Choose one with "
            "`columns`."
        )
    column = columns[0]
    given = dataset.features[column]
    is_list = isinstance(given, (List, LargeList))
    kind = given.feature if is_list else given
    is_struct = isinstance(kind, dict) and {*kind} <= {"bytes", "path"}
    names_files = isinstance(kind, Value) and kind.dtype in _PATHS
    known = isinstance(kind, Image) or is_struct or (isinstance(kind, Value) and kind.dtype in ("null", *_BYTES))
    if not known and not names_files:
        raise AMAError(
            f"Column '{column}' of task '{task}' is of type {short(given, 100)}, which is no image. Give images "
            "(`datasets.Image`), paths of files or bytes; lists of them in a column 'images'."
        )
    stored = dataset.data.column(column)
    lacks = stored.null_count > 0
    if stored.null_count == len(stored):
        return dataset.remove_columns([column])
    empty = is_list and any(chunk.flatten().null_count for chunk in stored.chunks)
    if isinstance(kind, Image) and kind.decode and not (lacks or empty) and is_list == (column == IMAGES):
        return dataset

    def read(value: Any, number: int) -> Any:
        values = [] if value is None else value if is_list else [value]
        where = f"Task '{task}', row {number} of the {split} pairs"
        found = [_stored(image, where, folders) for image in values]
        return found[0] if target == IMAGE else found

    target = IMAGE if column == IMAGE and not is_list and not lacks else IMAGES
    return _rewritten(dataset, column, target, read, f"Reading the images of {task}")


def _rewritten(dataset: Dataset, column: str, target: str, change: Callable[[Any, int], Any], desc: str) -> Dataset:
    """Change what a column of images stores, `{bytes, path}` or lists of it, and call it `target`; nothing is decoded."""

    def rewrite(table: pa.Table, numbers: list[int]) -> pa.Table:
        values = [change(value, number) for value, number in zip(table[column].to_pylist(), numbers, strict=True)]
        kind = Image.pa_type if target == IMAGE else pa.list_(Image.pa_type)
        return table.drop_columns([column]).append_column(target, pa.array(values, kind))

    features = {name: feature for name, feature in dataset.features.items() if name != column}
    features = Features({**features, target: Image() if target == IMAGE else _MANY})
    rewritten = dataset.with_format("arrow").map(
        rewrite, batched=True, batch_size=_AT_ONCE, with_indices=True, features=features, desc=desc
    )
    return rewritten.with_format(None)


def _stored(image: Any, where: str, folders: Sequence[Path] | None) -> dict[str, Any]:
    """An image as `Image` stores it: its bytes, or else the path of its file."""
    if isinstance(image, (bytes, bytearray)):
        image = {"bytes": image}
    if isinstance(image, str):
        image = {"path": image}
    if not image or (image.get("bytes") is None and image.get("path") is None):
        raise AMAError(
            f"{where} has an empty image among its images. Drop such rows, or leave the image out of the list."
        )
    if image.get("bytes") is not None:
        # Without the name of its file: `Image` prefers a file of that name, if there happens to be one
        return {"bytes": image["bytes"], "path": None}
    path = image["path"]
    if "://" in path:
        raise AMAError(
            f"{where} names the image {short(path)}, and nothing is downloaded in training. Save it in the dataset."
        )
    if folders is None:
        raise AMAError(
            f"{where} names the file {short(path)} as its image, and a dataset of the Hub has to hold its images. Download the "
            "dataset, and name the local files in the task."
        )
    for place in (Path(path), *(folder / path for folder in folders)):
        if place.is_file():
            return {"bytes": None, "path": str(place.absolute())}
    raise AMAError(
        f"{where} names the image {short(path)}, which is not there. Mend the path; it may be relative to the data's folder."
    )


def unite_images(parts: Sequence[Dataset]) -> list[Dataset]:
    """The tasks' pairs with the same column of images, if any of them has one: `images`, empty for pairs without.

    Parts without texts are left alone.
    """
    having = [part for part in parts if "chosen" in part.column_names]
    kinds = {column for part in having for column in IMAGE_COLUMNS if column in part.column_names}
    if not kinds or (len(kinds) == 1 and all(kinds <= {*part.column_names} for part in having)):
        return list(parts)
    return [_with_list(part) if "chosen" in part.column_names else part for part in parts]


def _with_list(part: Dataset) -> Dataset:
    if IMAGES in part.column_names:
        return part
    if IMAGE not in part.column_names:
        features = Features({**part.features, IMAGES: _MANY})
        return part.map(lambda batch: {IMAGES: [[]] * len(batch["chosen"])}, batched=True, features=features)
    return _rewritten(part, IMAGE, IMAGES, lambda image, number: [image], "Putting images into lists")


def _has_texts_alone(kind: Any) -> bool:
    """Whether a column, by its type, holds plain texts, or messages whose contents are texts."""
    message = getattr(kind, "feature", None)
    kind = message.get("content") if isinstance(message, dict) else kind
    return isinstance(kind, Value) and kind.dtype in ("string", "large_string")


def check_places(dataset: Dataset, task: str, split: str) -> None:
    """Raise an `AMAError` for the first pair whose messages have not as many places for images as it has images.

    Args:
        dataset (`Dataset`): Pairs with explicit prompts and, if they are about images, what [`read_images`] returns.
        task, split (`str`): For messages.
    """
    columns = [column for column in IMAGE_COLUMNS if column in dataset.column_names]
    if not columns and all(_has_texts_alone(dataset.features[side]) for side in _SIDES):
        return
    if columns and "tools" in dataset.column_names:
        having = [number for number, row in enumerate(dataset.select_columns(["tools"])) if row["tools"]]
        if having:
            raise AMAError(
                f"Task '{task}', row {having[0]} of the {split} pairs has images and tools, and DPOTrainer gives no tools to the chat "
                "template of such a pair. Write them into its messages, or leave the column out."
            )
    counts = list_lengths(dataset, IMAGES) if columns == [IMAGES] else [len(columns)] * len(dataset)
    for number, (row, count) in enumerate(zip(dataset.select_columns(list(_SIDES)), counts, strict=True)):
        if not all(isinstance(row[side], list) for side in _SIDES):
            return  # a plain text has its processor's own marks for images
        where = f"Task '{task}', row {number} of the {split} pairs"
        if not columns and not any(map(_names_image, (message for side in _SIDES for message in row[side]))):
            continue
        if not columns:
            raise AMAError(
                f"{where} has a part {{type: image}} in its messages, and there is no column 'images' with the image. Name it with "
                "`columns`; an image within a message is not read."
            )
        try:
            prepare_multimodal_messages(row["prompt"], images=[None] * int(count))
            for side in _SIDES[1:]:
                prepare_multimodal_messages(row[side])
        except (KeyError, TypeError, ValueError) as error:
            raise AMAError(
                f"{where} has {count} images and messages that do not fit: {first_line(error)} Give the prompt as many parts "
                "{type: image} as the pair has images, or none at all and texts as contents; answers have none."
            ) from error


def _names_image(message: dict[str, Any]) -> bool:
    content = message.get("content")
    parts = content if isinstance(content, list) else ()
    return any(isinstance(part, dict) and part.get("type") == "image" for part in parts)


# ---- As they are stored ----


def stored_images(dataset: Dataset) -> Iterator[list[dict[str, Any]]]:
    """The images of each row as `{bytes, path}`, none of which is decoded."""
    columns = [column for column in IMAGE_COLUMNS if column in dataset.column_names]
    for batch in dataset.select_columns(columns).with_format("arrow").iter(_AT_ONCE):
        for row in batch.to_pylist():
            yield images_of(row)


def seen_images(dataset: Dataset, where: str) -> list[list[str]]:
    """[`image_identity`] of each row's images.

    Raises:
        AMAError: If one cannot be read. `where` says whose rows they are.
    """
    columns = [column for column in IMAGE_COLUMNS if column in dataset.column_names]

    def look(table: pa.Table, numbers: list[int]) -> pa.Table:
        seen = []
        for row, number in zip(table.to_pylist(), numbers, strict=True):
            try:
                seen.append([image_identity(image) for image in images_of(row)])
            except Exception as error:  # of Pillow, which has its own for every format
                raise AMAError(
                    f"{where}, row {number}: an image cannot be read ({type(error).__name__}: {first_line(error)}). Mend it, or drop "
                    "the row."
                ) from error
        return pa.table({IMAGES: pa.array(seen, pa.list_(pa.string()))})

    # By `map`, which keeps the result: to decode all images takes a while
    found = dataset.select_columns(columns).with_format("arrow").map(
        look, batched=True, batch_size=_AT_ONCE, with_indices=True, remove_columns=columns,
        features=Features({IMAGES: List(Value("string"))}), desc="Looking at images",
    )  # fmt: skip
    return found.with_format(None)[IMAGES][:]


def content_of(image: dict[str, Any]) -> bytes:
    """The file of a stored image."""
    return Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]


def embedded(dataset: Dataset) -> Dataset:
    """Pairs whose images are in the rows themselves, byte by byte as they were, and no longer say where their files were."""

    def embed(value: Any, number: int) -> Any:
        found = [
            {"bytes": content_of(image), "path": None} for image in (value if isinstance(value, list) else [value])
        ]
        return found if isinstance(value, list) else found[0]

    for column in IMAGE_COLUMNS:
        if column in dataset.column_names:
            dataset = _rewritten(dataset, column, column, embed, "Embedding images")
    return dataset


def check_embedded(dataset: Dataset, refuse: Callable[[str], Exception]) -> None:
    """Hold a stranger's images to what [`embedded`] makes: none of them may name a file, which would be opened.

    Args:
        dataset (`Dataset`): Rows that may have images.
        refuse (`Callable`): Makes an error of what is wrong.
    """
    for number, images in enumerate(stored_images(dataset) if has_images(dataset) else ()):
        for image in images:
            if not isinstance(image, dict) or not image["bytes"] or image["path"] is not None:
                raise refuse(f"Row {number} has an image that is not in the row itself")
