"""Reads a dataset with the texts that stand in its files, which readers take for numbers, times or nothing here and there.

pandas, which reads CSV for `datasets`, takes "None", "NA" and "null" for missing and "007" for seven; pyarrow, which reads JSON, takes
days and times for such; and of a column that holds texts and lists, `datasets` parses the texts too, and it rounds numbers. So CSV is
read as text, and JSON of which something may have been changed once more by Python's own reader.
"""

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from datasets import (
    Dataset,
    DatasetBuilder,
    DownloadManager,
    Features,
    Json,
    LargeList,
    List,
    NamedSplit,
    ReadInstruction,
    Value,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
)
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import snapshot_download

from ..common.errors import AMAError
from .exact_json import exact_json


_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMES = ("timestamp", "date", "time", "duration")
# What Arrow writes if it casts a time that it has read out of a text back into one
_CAST_TIME = r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(\.\d+)?Z?$"
# JSON that is no mapping, or holds a fraction, of which `datasets` keeps ten places
_PARSED_TEXT = r"^\s*[^{\s]|[:,\[\s]-?\d+(\.\d|[eE])"
_OTHER_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}


def load_texts(split: str, **source: Any) -> tuple[Dataset, str | None]:
    """[`~datasets.load_dataset`], and the commit of the Hub dataset, if it is one.

    Raises:
        AMAError: If a CSV file has no columns to read texts from.
        Exception: Whatever `load_dataset` raises.
    """
    source |= _own_cache(source)
    if source["path"] == "csv":
        source |= _csv_as_text(source)
    try:
        dataset = load_dataset(split=split, **source)
    except DatasetGenerationError as error:
        if "timestamp" not in str(error.__cause__):
            raise
        return _read_json_of_two_types(split, source, error)
    commit = _commit(dataset)
    reader = dataset.info.builder_name
    if reader == "csv" and source["path"] != "csv" and not _has_texts_alone(dataset):
        source = _with_files(source, commit)
        dataset = load_dataset(split=split, **source, **_csv_as_text(source))
    elif reader == "json":
        features, changed = _texts(dataset.features, dataset.data)
        if changed:
            sizes = {name: info.num_examples for name, info in dataset.info.splits.items()}
            builder = load_dataset_builder(**_with_files(source, commit))
            dataset = _read_json_again(builder, split, Features(features), sizes)
    for column, feature in dataset.features.items():
        if feature == Value("string_view"):  # which little of Arrow works with
            dataset = dataset.cast_column(column, Value("string"))
    return dataset, commit


def _own_cache(source: dict[str, Any]) -> dict[str, str]:
    """A folder of the cache that is named after what local files hold.

    `datasets` knows a file by its path and time stamp, so that another file with the same time (a copy that keeps it, an archive
    whose times are fixed) would be read as what was there before.
    """
    folder, files = os.path.expanduser(source.get("data_dir") or ""), source.get("data_files")
    if os.path.isdir(source["path"]):
        folder = os.path.join(source["path"], folder)
    elif source["path"] not in ("json", "csv", "parquet"):
        return {}
    if not folder and files is None:
        return {}
    names = ["**"] if files is None else _strings(files)
    patterns = [
        os.path.join(start, name) for start in (folder, glob.escape(folder)) for name in names
    ]  # it may be one already
    places = {place for pattern in patterns for place in (*glob.glob(pattern, recursive=True), pattern)}
    hasher = hashlib.sha256()
    for place in sorted(places):
        inside = glob.glob(os.path.join(glob.escape(place), "**"), recursive=True) if os.path.isdir(place) else [place]
        for file in filter(os.path.isfile, sorted(inside)):
            hasher.update(f"{file}\0{_sha256(file)}\0".encode())
    return {"cache_dir": os.path.join(datasets.config.HF_DATASETS_CACHE, "trl_ama", hasher.hexdigest()[:16])}


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _strings(files: Any) -> list[str]:
    entries = (
        files.values() if isinstance(files, dict) else files if isinstance(files, (list, tuple)) else [str(files)]
    )
    return [
        name for entry in entries for name in (_strings(entry) if isinstance(entry, (list, tuple)) else [str(entry)])
    ]


def _commit(dataset: Dataset) -> str | None:
    """The commit of the Hub dataset that a dataset was just loaded from: `datasets` names the folder in its cache by it."""
    for file in dataset.cache_files:
        folder = Path(file["filename"]).parent
        if _COMMIT.fullmatch(folder.name) and "___" in str(folder):
            return folder.name
    return None


def _with_files(source: dict[str, Any], commit: str | None) -> dict[str, Any]:
    """`source`, or the folder of its files on this machine, if it was read out of the cache as there is no network."""
    if commit is None or load_dataset_builder(**source).config.data_files is not None:
        return source
    folder = snapshot_download(source["path"], repo_type="dataset", revision=commit, local_files_only=True)
    return {**source, "path": folder, "revision": None}


def _local_files(builder: DatasetBuilder) -> dict[str, list[str]]:
    """Split → its files, downloaded and unpacked."""
    manager = DownloadManager(dataset_name=builder.dataset_name, base_path=builder.base_path)
    return {
        str(split): manager.download_and_extract(list(files)) for split, files in builder.config.data_files.items()
    }


# ---- CSV ----


def _csv_as_text(source: dict[str, Any]) -> dict[str, Any]:
    """What to tell the loader of CSV so that every value is the text in the file; an empty one is missing."""
    builder = load_dataset_builder(**source)
    files = [str(file) for files in builder.config.data_files.values() for file in files]
    tabs = {}
    if source["path"] == "csv" and all(".tsv" in Path(file).suffixes for file in files):
        tabs = {"sep": "\t"}
    as_text = {"keep_default_na": False, "na_values": [""]}
    names = None
    for file in [file for files in _local_files(builder).values() for file in files]:
        reading = {"dtype": object, "sep": builder.config.sep, **tabs, **as_text}
        head = pd.read_csv(file, nrows=1, **reading)
        _check_names(pd.read_csv(file, nrows=1, header=None, **reading), file)
        _check_head(head, file)
        names = list(head.columns) if names is None else names
        if set(names) != set(head.columns):
            raise AMAError(
                f"Two CSV files have other columns, {names} and {list(head.columns)} ('{file}'). Bring them into one form."
            )
    return {**tabs, **as_text, "features": Features(dict.fromkeys(names or [], Value("string")))}


def _has_texts_alone(dataset: Dataset) -> bool:
    """Whether pandas took nothing for anything but text: then no text was changed."""
    kinds = (Value("string"), Value("large_string"))
    return all(
        feature in kinds and not dataset.data.column(name).null_count and not name.startswith("__index_level_")
        for name, feature in dataset.features.items()
    )


def _check_names(first: pd.DataFrame, file: str) -> None:
    names = [str(name) for name in first.iloc[0].dropna()] if len(first) else []
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise AMAError(
            f"'{file}' has two columns '{twice}', and only one of them would be read. Rename or remove one."
        )


def _check_head(head: pd.DataFrame, file: str) -> None:
    # With one value too many, pandas takes the first values for the rows' names, and the others shift
    if not isinstance(head.index, pd.RangeIndex):
        raise AMAError(
            f"The first row of '{file}' has more values than there are columns ({list(head.columns)}). Put texts that hold commas between "
            "quotes."
        )
    if len(head.columns) == 1:
        name = str(head.columns[0])
        found = next((words for mark, words in _OTHER_SEPARATORS.items() if mark in name), None)
        if found is not None:
            raise AMAError(
                f"'{file}' seems to have {found} between its values ({name!r}). Save it with commas, or as JSON lines."
            )


# ---- JSON ----


def _texts(features: Any, data: Any) -> tuple[Any, bool]:
    """The features as they are if no text is taken for anything else, and whether one may have been changed.

    Args:
        features: Features or a part of them.
        data: A table or array of theirs.
    """
    if isinstance(features, dict):
        found = {name: _texts(part, _field(data, name)) for name, part in features.items()}
        return {name: part for name, (part, _) in found.items()}, any(changed for _, changed in found.values())
    if isinstance(features, (List, LargeList)):
        part, changed = _texts(features.feature, pc.list_flatten(data))
        return (type(features)(part) if changed else features), changed
    if isinstance(features, Value) and features.dtype.startswith(_TIMES):
        return Value("string"), True
    if isinstance(features, Value) and features.dtype in ("string", "large_string"):
        return features, _any(data, _CAST_TIME)
    if isinstance(features, Json):  # mappings that hold no fractions are as they were
        return features, _any(_storage(data), _PARSED_TEXT)
    return features, False


def _field(data: Any, name: str) -> Any:
    if isinstance(data, pa.Table) or hasattr(data, "column_names"):
        return data.column(name)
    return pc.struct_field(data, name)


def _storage(data: Any) -> Any:
    if isinstance(data, pa.ChunkedArray):
        return pa.chunked_array([chunk.storage for chunk in data.chunks], type=data.type.storage_type)
    return data.storage


def _any(texts: Any, pattern: str) -> bool:
    return bool(pc.any(pc.match_substring_regex(texts, pattern)).as_py())


def _read_json_of_two_types(split: str, source: dict[str, Any], error: Exception) -> tuple[Dataset, str | None]:
    """A dataset whose first file holds nothing but times in a column, and another one other texts, which `datasets` refuses."""
    builder = load_dataset_builder(**source)
    if builder.name != "json" or builder.config.field is not None:
        raise error
    first = next(iter(_local_files(builder).values()))[0]
    first = {"path": "json", "data_files": glob.escape(first)}
    start = load_dataset(**first, split="train", encoding=builder.config.encoding, **_own_cache(first))
    features, changed = _texts(start.features, start.data)
    if not changed:
        raise error
    commit = builder.hash if builder.repo_id and _COMMIT.fullmatch(builder.hash or "") else None
    return _read_json_again(builder, split, Features(features)), commit


def _read_json_again(
    builder: DatasetBuilder, split: str, features: Features, sizes: dict[str, int] | None = None
) -> Dataset:
    """The same rows, with `features`, by a reader that leaves texts alone.

    Args:
        builder (`DatasetBuilder`): Of the loader `json`.
        split (`str`): As for `load_dataset`.
        features (`Features`): What the rows hold.
        sizes (`dict[str, int]`, *optional*): Split → its rows, if they were counted.
    """
    files = _local_files(builder)
    counted = sizes or {name: len(_whole_split(builder, name, paths, features)) for name, paths in files.items()}
    parts = []
    for part in ReadInstruction.from_spec("+".join(counted) if split == "all" else split).to_absolute(counted):
        whole = _whole_split(builder, part.splitname, files[part.splitname], features)
        if len(whole) != counted[part.splitname]:
            raise AMAError(
                f"Split '{part.splitname}' of {files[part.splitname]} was read as {counted[part.splitname]} rows first and as "
                f"{len(whole)} again. Write a JSON object on every line."
            )
        parts.append(whole.select(range(part.from_, part.to)))
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def _whole_split(builder: DatasetBuilder, name: str, paths: list[str], features: Features) -> Dataset:
    return Dataset.from_generator(
        _rows,
        features=features,
        split=NamedSplit(name),
        gen_kwargs={
            "paths": paths,
            "coding": (builder.config.encoding, builder.config.encoding_errors),
            "field": builder.config.field,
            "features": features,
            "contents": [_sha256(path) for path in paths],  # for the cache
        },
    )


def _rows(
    paths: list[str], coding: tuple[str, str | None], field: str | None, features: Features, contents: list
) -> Iterator[dict[str, Any]]:
    for path in paths:
        for row in _values(path, "utf-8-sig" if coding[0] == "utf-8" else coding[0], coding[1], field):
            yield {name: _encoded(feature, (row or {}).get(name)) for name, feature in features.items()}


def _values(path: str, encoding: str, errors: str | None, field: str | None) -> Iterator[Any]:
    """The rows of a file of JSON lines, or of one JSON list or object."""
    with open(path, encoding=encoding, errors=errors) as file:
        if field is None:
            try:
                first = next((line for line in file if line.strip()), "")
                value = json.loads(first) if first else None
                if isinstance(value, dict) or first.strip() == "null":
                    yield value
                    yield from (json.loads(line) for line in file if line.strip())
                    return
            except json.JSONDecodeError:  # in lines or not: the first one tells
                if not first.lstrip().startswith(("[", "{")):
                    raise
            file.seek(0)
        value = json.load(file)
    value = value if field is None else value[field]
    yield from value if isinstance(value, list) else [value]


def _encoded(feature: Any, value: Any) -> Any:
    """A value for the writer, which takes a text for JSON if it can be read as such."""
    if value is None:
        return None
    if isinstance(feature, Json):
        return exact_json(value)
    if isinstance(feature, (List, LargeList)):
        return [_encoded(feature.feature, entry) for entry in value]
    if isinstance(feature, dict):
        return {name: _encoded(part, value.get(name)) for name, part in feature.items()}
    return value
