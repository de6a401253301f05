"""Images in data files: in every form that a dataset gives them, the same pair; what cannot be kept is refused by name."""

import io
import json

import numpy as np
import pytest
from datasets import Dataset
from vision_model import IMAGE_TOKENS, make_processor, make_vision_rows

from trl_ama import AMAError, TaskMixtureConfig, load_tasks
from trl_ama.check.duplicates import duplicates, text_hashes
from trl_ama.report.examples import _texts
from trl_ama.tasks.forms import pair_id_of
from trl_ama.tasks.image_tokens import image_pair_ids
from trl_ama.tasks.images import embedded, image_identity, images_of, stored_images
from trl_ama.tasks.loading import fits_into, prompt_fits_into


ROW = make_vision_rows("name", 1)[0]
IN_PARTS = make_vision_rows("name", 1, parts=True)[0]
IMAGE = ROW["images"][0]
TEXTS = {name: value for name, value in ROW.items() if name != "images"}


def _file(image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def _load(rows, folder, **task):
    """A task's pairs out of a file that holds `rows`."""
    path = str(folder / "pairs.parquet")
    Dataset.from_list(rows).to_parquet(path)
    return load_tasks(TaskMixtureConfig(tasks=[{"task": "name", "path": "parquet", "data_files": path, **task}]))[
        "train"
    ]


def _load_lines(rows, folder):
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_tasks(TaskMixtureConfig(tasks=[{"task": "name", "path": "json", "data_files": str(path)}]))["train"]


FORMS = {
    "a list": {"images": [IMAGE]},
    "one image": {"image": IMAGE},
    "one under the other name": {"images": IMAGE},
    "bytes": {"image": _file(IMAGE, "PNG")},
    "bytes of another format": {"image": _file(IMAGE, "TIFF")},
    "bytes and a name": {"image": {"bytes": _file(IMAGE, "PNG"), "path": "apple.png"}},
    "a list of these": {"images": [{"bytes": _file(IMAGE, "PNG"), "path": "apple.png"}]},
}


@pytest.mark.parametrize("form", FORMS)
def test_one_pair_in_every_form(form, tmp_path):
    pairs = _load([{**TEXTS, **FORMS[form]}], tmp_path)
    assert pairs[0]["pair_id"] == pair_id_of(ROW)
    assert np.array_equal(np.array(images_of(pairs[0])[0]), np.array(IMAGE))


@pytest.mark.parametrize("column", ["image", "images"])
def test_files_stay_as_they_are(column, tmp_path):
    file = _file(IMAGE, "JPEG")  # to decode it and write it again would make another image of it
    rows = [{**TEXTS, column: file if column == "image" else [file]}] * 2
    pairs = _load(rows, tmp_path)
    saved = embedded(pairs)
    for part in (pairs, saved):
        assert list(stored_images(part)) == [[{"bytes": file, "path": None}]] * 2
    assert saved.features == pairs.features


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_paths_start_at_the_datas_folder(kind, tmp_path):
    (tmp_path / "pictures").mkdir()
    IMAGE.save(tmp_path / "pictures" / f"apple.{kind}")
    for path in (f"pictures/apple.{kind}", str(tmp_path / "pictures" / f"apple.{kind}")):
        pairs = _load_lines([{**TEXTS, "images": [path]}], tmp_path)
        assert pairs[0]["pair_id"] == pair_id_of(ROW)


def test_pairs_without_an_image_among_others(tmp_path):
    rows = [{**TEXTS, "image": IMAGE}, {**TEXTS, "image": None}]
    pairs = _load(rows, tmp_path)
    assert [len(row["images"]) for row in pairs] == [1, 0]
    assert pairs["pair_id"][:] == [pair_id_of(ROW), pair_id_of(TEXTS)]
    assert "images" not in _load([{**TEXTS, "image": None}], tmp_path).column_names


def test_tasks_with_and_without_images_unite(tmp_path):
    tasks = []
    for name, images in (("a", {"images": [IMAGE, IMAGE]}), ("b", {"image": IMAGE}), ("c", {})):
        path = str(tmp_path / f"{name}.parquet")
        Dataset.from_list([{**TEXTS, **images}]).to_parquet(path)
        tasks.append({"task": name, "path": "parquet", "data_files": path})
    pairs = load_tasks(TaskMixtureConfig(tasks=tasks))["train"]
    assert [len(row["images"]) for row in pairs] == [2, 1, 0]
    assert pairs["pair_id"][1:] == [pair_id_of(ROW), pair_id_of(TEXTS)]


def test_what_is_seen_names_an_image():
    palette = IMAGE.convert("P")
    assert image_identity(palette) == image_identity(palette.convert("RGBA"))
    assert image_identity(IMAGE) == image_identity(_file(IMAGE, "PNG")) != image_identity(IMAGE.convert("L"))
    assert image_identity(IMAGE) != image_identity(IMAGE.transpose(0))


def _refused(rows, folder) -> str:
    with pytest.raises(AMAError) as error:
        _load(rows, folder)
    return str(error.value)


def test_what_cannot_be_kept_is_named(tmp_path):
    good = {**TEXTS, "images": [IMAGE]}
    assert "both columns 'images' and 'image'" in _refused([{**good, "image": IMAGE}], tmp_path)
    assert "is no image" in _refused([{**TEXTS, "images": [1.5]}], tmp_path)
    assert "row 1 of the train pairs has images and tools" in _refused(
        [{**good, "tools": None}, {**good, "tools": "[{}]"}], tmp_path
    )
    empty = {**TEXTS, "images": [{"bytes": None, "path": None}]}
    assert "row 0 of the train pairs has an empty image" in _refused([empty], tmp_path)
    assert "provided (2) does not match number of image placeholders (1)" in _refused(
        [IN_PARTS, {**IN_PARTS, "images": [IMAGE, IMAGE]}], tmp_path
    )
    without = {name: value for name, value in IN_PARTS.items() if name != "images"}
    assert "there is no column 'images'" in _refused([without], tmp_path)
    assert "row 1: an image cannot be read" in _refused(
        [{**TEXTS, "image": _file(IMAGE, "PNG")}, {**TEXTS, "image": b"no image"}], tmp_path
    )


def test_files_that_are_not_there_are_named(tmp_path):
    for path, said in (("https://example.org/a.png", "nothing is downloaded"), ("apple.png", "which is not there")):
        with pytest.raises(AMAError, match=f"row 0 of the train pairs names the image '{path}', (and )?{said}"):
            _load_lines([{**TEXTS, "images": [path]}], tmp_path)


def test_lengths_count_the_images_tokens(tokenizer):
    processor = make_processor(tokenizer)
    ids = image_pair_ids(processor, ROW)
    token = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert ids["prompt_ids"].count(token) == IMAGE_TOKENS
    longest = len(ids["prompt_ids"]) + max(len(ids["chosen_ids"]), len(ids["rejected_ids"]))
    assert fits_into(processor, longest)(ROW) and not fits_into(processor, longest - 1)(ROW)
    prompt = len(ids["prompt_ids"])
    assert prompt_fits_into(processor, prompt + 1)(ROW) and not prompt_fits_into(processor, prompt)(ROW)


def test_same_words_about_another_image_are_no_duplicate(tmp_path):
    rows = [{**TEXTS, "image": IMAGE}, {**TEXTS, "image": IMAGE.transpose(0)}, {**TEXTS, "image": IMAGE}]
    found = duplicates({"name": {"train": text_hashes(_load(rows, tmp_path))}})["name"]
    assert (found["repeated_pairs"], found["repeated_prompts"]) == (1, 1)


def test_page_says_that_there_are_images(tmp_path):
    pairs = _load([IN_PARTS, {**IN_PARTS, "chosen": IN_PARTS["rejected"], "rejected": IN_PARTS["chosen"]}], tmp_path)
    pairs.to_parquet(str(tmp_path / "test.parquet"))
    shown = _texts(tmp_path, [pairs[0]["pair_id"]])
    text = IN_PARTS["prompt"][0]["content"][1]["text"]
    assert shown[pairs[0]["pair_id"]]["prompt"] == [("", "1 image, not shown here"), ("user", f"[image]\n{text}")]
