"""What the page of a run is made of: files of a folder, without secrets; what is missing or damaged is named."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_runs import FINGERPRINT, Tree, copy_fixture, finished_fixture, make_run, page_of, words, write  # noqa: F401 - fixtures

from trl_ama import cli
from trl_ama.common.run_folder import MARGINS_FILE, NOTE_FILE
from trl_ama.recipe.text import public_arguments
from trl_ama.report.collect import MASK, collect, masked
from trl_ama.report.page import write_comparison


def test_secrets_are_masked(copy):
    path = copy / "generalists/ama_s/stage.json"
    stage = json.loads(path.read_text())
    token = "hf_" + "aB3" * 10
    stage["fingerprint"] |= {"hub_token": "h1dden", "list": [{"password": "h1dden"}], "note": f"see {token}"}
    write(path, stage)
    write(copy / NOTE_FILE, {"recipe": f"run_name: {token}", "arguments": f"--run_name {token}", "mixing": "ama_s"})
    page = page_of(copy)
    assert not re.search(r"sesame|h1dden|aB3", page)
    assert page.count(MASK) >= 3 and "&lt;pad&gt;" in page
    assert masked({"a": {"api_key": 1, "pad_token": "x"}}) == {"a": {"api_key": MASK, "pad_token": "x"}}
    assert masked({"secret": None}) == {"secret": None}  # nothing to hide


def test_commands_hide_secrets_and_folders():
    script = str(Path(cli.__file__).parent / "scripts" / "ama.py")
    argv = [script, "--config", "/home/me/my recipe.yaml", "--hub_token", "s3cret", "--hub_token=s3cret", "--seed", "3",
            "--model_init_kwargs", '{"token": "s3cret"}', "--run_name", "hf_" + "x" * 20, "--output_dir", "outputs/it's"]  # fmt: skip
    text = public_arguments(argv)
    assert "s3cret" not in text and "x" * 20 not in text and "/home" not in text
    assert "--config 'my recipe.yaml'" in text and "--seed 3" in text and "--output_dir 'outputs/it'\"'\"'s'" in text
    assert public_arguments(["/usr/bin/pytest", "--token", "x"]) is None and public_arguments([]) is None


@pytest.mark.parametrize(
    ("gone", "sentence"),
    [
        ("results.json", "There is no evaluation yet. Run trl ama-eval --config …."),
        ("generalists", "No generalist is trained yet"),
        (MARGINS_FILE, "The margins of single held-out pairs were not kept"),
        ("reference_losses", "The reference losses hold no texts of helpful, code"),
        ("generalists/ama_s/trainer_state.json", "The generalist ama_s has no log yet."),
        ("specialists", "Specialists"),
        ("report", "The recipe was not noted"),
    ],
)
def test_missing_pieces_are_named(copy, gone, sentence):
    path = copy / gone
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() or gone == "report" else path.unlink()
    assert sentence in words(page_of(copy))


def test_only_specialists(copy):
    for name in ("generalists", "reference_losses", "results.json", MARGINS_FILE):
        path = copy / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    write(copy / "specialists/code/stage.json", {"fingerprint": {}, "result": None})
    write(copy / "specialists/code/checkpoint-5/trainer_state.json", {})
    page = words(page_of(copy))
    assert "not finished, last checkpoint at step 5" in page and "specialist helpful done, 7 steps" in page


def test_run_in_progress_shows_its_last_checkpoint(copy):
    folder = copy / "generalists/ama_s"
    for step in (9, 10):
        write(folder / f"checkpoint-{step}/trainer_state.json", {"log_history": [
            {"step": number, "ama/weight/code": 0.5} for number in range(1, step)]})  # fmt: skip
    (folder / "trainer_state.json").unlink()
    write(folder / "stage.json", {"fingerprint": FINGERPRINT, "result": None})
    run = collect(copy)
    assert run["history"]["ama_s"]["steps"] == list(range(1, 10))
    assert "The generalist ama_s is not finished, last checkpoint at step 10." in run["missing"]
    assert ("generalist", "ama_s", "not finished, last checkpoint at step 10") in run["stages"]


@pytest.mark.parametrize("content", ["{", "[]", "null", "1e999", '{"policies": []}', '{"policies": {"x": {"by_task": 3}}}',
                                     '{"tasks": [1], "policies": {"x": {"by_task": {"a": {"accuracy": "high"}}}}}',
                                     '{"log_history": [{"step": 1e9, "ama/weight/code": 1}, {"step": -1}, 3], "result": 4}',
                                     '{"fingerprint": [], "result": {"eval_pairs": -3, "eval_accuracy": 7, "steps": "x"}}',
                                     "[" * 100_000, "\x00"])  # fmt: skip
def test_damaged_files_are_named_and_left_out(copy, content):
    for path in copy.rglob("*.json"):
        path.write_text(content)
    page = page_of(copy)
    assert Tree(page).open == []
    if content in ("{", "[]"):
        assert "results.json is damaged and was left out." in words(page)


@pytest.mark.parametrize(
    "name", ["results.json", "generalists/ama_s/stage.json", MARGINS_FILE, "reference_losses/code/test.parquet"]
)
def test_files_that_are_something_else(copy, name):
    (copy / name).unlink()
    (copy / name).mkdir()
    assert Tree(page_of(copy)).open == []
    (copy / name).rmdir()
    (copy / name).write_bytes(b"PAR1 not really PAR1")
    assert Tree(page_of(copy)).open == []


def test_margins_of_another_evaluation_are_not_shown(copy):
    table = pq.read_table(copy / MARGINS_FILE)
    column = table.schema.get_field_index("ama_s")
    pq.write_table(table.set_column(column, "ama_s", pa.array(np.ones(len(table)))), copy / MARGINS_FILE)
    assert "are of another evaluation" in words(page_of(copy)) and not collect(copy)["examples"]


def test_names_in_files_are_no_paths(copy):
    """A stranger's run that names a folder outside of it."""
    results = json.loads((copy / "results.json").read_text())
    shutil.copytree(copy / "specialists/code", copy.parent / "outside")
    results["tasks"] = ["../../outside", "../outside"]
    write(copy / "results.json", results)
    assert all(row["steps"] is None for row in collect(copy)["specialists"])


def test_comparison_of_a_run_that_is_half_done(finished, tmp_path):
    other = make_run(tmp_path / "other", seed=0)
    stage = other / "generalists/proportional/stage.json"
    write(stage, {"fingerprint": FINGERPRINT, "result": None})
    text = words(write_comparison([finished, other], tmp_path / "both.html").read_text(encoding="utf-8"))
    assert "other is not complete (generalist proportional not finished)." in text
    assert "are not the same in all runs" not in text
