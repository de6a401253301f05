"""Touch points in datasets: tables, fingerprints, caches and streams."""

import json

from datasets import Dataset, Features, IterableDataset, Json, concatenate_datasets
from datasets.distributed import split_dataset_by_node
from datasets.iterable_dataset import BufferShuffledExamplesIterable
from tiny_pairs import make_dataset
from vision_model import make_image

from trl_ama.dpo.streams import _own_copy


def test_21_datasets_names_its_cache_by_commit(hub):
    from datasets import load_dataset

    from trl_ama.tasks.exact_texts import _commit

    commit = hub.write("dataset", "org/rows", {"train.jsonl": '{"a": 1}\n'})
    assert _commit(load_dataset("org/rows", split="train")) == commit
    assert _commit(make_dataset({"list": 2})) is None


def test_29_dataset_of_a_table_and_row_numbers():
    from datasets import Dataset

    dataset = Dataset.from_dict({"a": [5, 6, 7, 8]})
    assert dataset._indices is None
    selected = dataset.select([3, 1, 1])
    assert selected.data.num_rows == 4 and selected._indices.column(0).to_pylist() == [3, 1, 1]
    again = Dataset(
        selected.data, info=selected.info, split=selected.split, indices_table=selected._indices,
        fingerprint=selected._fingerprint,
    )  # fmt: skip
    assert again["a"][:] == [8, 6, 6]


def test_84_a_datasets_fingerprint_is_of_its_rows():
    data = make_dataset({"list": 4})
    assert data._fingerprint != data.select([0, 1])._fingerprint != data.shuffle(seed=0)._fingerprint


def test_91_images_are_stored_as_bytes_and_paths():
    import io

    from datasets import Image

    buffer = io.BytesIO()
    make_image("apple").save(buffer, "JPEG")
    data = Dataset.from_dict({"image": [{"bytes": buffer.getvalue(), "path": None}]}).cast_column("image", Image())
    data = data.map(lambda row, number: {"number": number}, with_indices=True)
    stored = [row for batch in data.with_format("arrow").iter(2) for row in batch.to_pylist()]
    assert stored == [{"image": {"bytes": buffer.getvalue(), "path": None}, "number": 0}]


def numbers(count=10):
    for number in range(count):
        yield {"number": number}


def test_60_streams_continue_from_their_state():
    stream = IterableDataset.from_generator(numbers).map(lambda row: {"twice": 2 * row["number"]})
    stream = stream.filter(lambda row: row["number"] != 5)
    rows = iter(stream)
    assert [next(rows)["twice"] for _ in range(3)] == [0, 2, 4]
    state = json.loads(json.dumps(stream.state_dict()))
    stream.load_state_dict(state)
    assert [row["number"] for row in stream] == [3, 4, 6, 7, 8, 9]
    stream.load_state_dict(None)
    assert next(iter(stream))["number"] == 0


def test_61_a_stream_is_a_chain_of_objects_that_note_how_far_they_were_read():
    whole = IterableDataset.from_generator(numbers)
    even, odd = (
        whole.filter(lambda row, rest: row["number"] % 2 == rest, fn_kwargs={"rest": rest}) for rest in (0, 1)
    )
    assert even._ex_iterable.ex_iterable is not None
    joined = concatenate_datasets([even, odd])
    assert [type(part).__name__ for part in joined._ex_iterable.ex_iterables] == ["FilteredExamplesIterable"] * 2
    ours, theirs = (_own_copy(stream, "list") for stream in (even, odd))
    for own, rest in ((ours, 0), (theirs, 1)):
        rows = iter(own)
        assert [next(rows)["number"] for _ in range(2)] == [rest, rest + 2]
    for own, rest in ((ours, 0), (theirs, 1)):  # neither has moved the other
        own.load_state_dict(own.state_dict())
        assert next(iter(own))["number"] == rest + 4
    assert next(iter(even))["number"] == 0


def test_62_shuffled_and_split_streams_can_be_told():
    stream = IterableDataset.from_generator(numbers)
    assert stream._distributed is None
    assert isinstance(stream.shuffle(seed=1)._ex_iterable, BufferShuffledExamplesIterable)
    assert split_dataset_by_node(stream, 0, 2)._distributed is not None


def test_88_json_columns_keep_what_was_written():
    features = Features({"x": Json()})
    rows = Dataset.from_list([{"x": '{"a": 30e-2}'}, {"x": '{"a": 1}'}], features=features)
    for mapped in (rows.map(lambda x: {"y": 1}, input_columns=["x"]), rows.map(lambda row: {"y": 1})):
        assert mapped.data.column("x").to_pylist() == ['{"a": 30e-2}', '{"a": 1}']
        assert mapped["x"][:] == [{"a": 0.3}, {"a": 1}]


def test_92_datasets_names_the_files_that_it_read(hub):
    from datasets import ReadInstruction, load_dataset, load_dataset_builder

    commit = hub.write("dataset", "org/rows", {"train.jsonl": '{"a": 1}\n{"a": 2}\n', "test.jsonl": '{"a": 3}\n'})
    assert load_dataset("org/rows", split="train").info.builder_name == "json"
    builder = load_dataset_builder("org/rows")
    files = {str(split): [str(file) for file in files] for split, files in builder.config.data_files.items()}
    assert files == {name: [f"hf://datasets/org/rows@{commit}/{name}.jsonl"] for name in ("train", "test")}
    assert (builder.hash, builder.repo_id, builder.config.encoding, builder.config.field) == (
        commit,
        "org/rows",
        "utf-8",
        None,
    )
    parts = ReadInstruction.from_spec("train[50%:]+test").to_absolute({"train": 2, "test": 1})
    assert [(part.splitname, part.from_, part.to) for part in parts] == [("train", 1, 2), ("test", 0, 1)]
