"""A whole run on a tiny model: what it leaves, what a second one does, and files of other versions."""

import numpy as np
import pytest
from state_versions import refused, with_version
from whole_runs import SIZES, copy_fixture, finished_fixture, no_training_fixture, recipe_fixture  # noqa: F401 - fixtures

from trl_ama import AMAError, run_pipeline
from trl_ama.common.files import read_json
from trl_ama.common.versions import VERSIONS
from trl_ama.report.collect import collect
from trl_ama.report.results import result_table


def test_what_a_run_leaves(finished):
    output_dir, results = finished
    assert results == read_json(output_dir / "results.json")
    assert list(results["policies"]) == ["base", "specialists", "ama_s", "proportional"]
    base, specialists = results["policies"]["base"], results["policies"]["specialists"]
    for task in SIZES:
        assert base["by_task"][task]["accuracy"] == 0.5
        assert base["by_task"][task]["loss"] == pytest.approx(np.log(2))
        assert specialists["by_task"][task]["excess"] == 0
        assert base["by_task"][task]["pairs"] == 20
    assert specialists["by_task"]["brief"]["accuracy"] > 0.8
    for name in ("ama_s", "proportional"):
        summary, by_task = results["policies"][name]["summary"], results["policies"][name]["by_task"]
        assert summary["worst_accuracy"] == min(by_task[task]["accuracy"] for task in SIZES)
        assert summary["worst_excess"] == max(by_task[task]["excess"] for task in SIZES)
        assert by_task["brief"]["accuracy"] > 0.5
        assert (output_dir / "generalists" / name / "adapter_model.safetensors").is_file()
    assert (output_dir / "plots" / "mixture.png").read_bytes().startswith(b"\x89PNG")
    table = (output_dir / "results.md").read_text()
    assert "| **worst task**" in table and "| mean of tasks" in table
    card = (output_dir / "generalists" / "ama_s" / "README.md").read_text()
    assert result_table(results, this="ama_s").strip() in card
    assert "this model (ama_s)" in card and "mixture.png" in card and "tags:" in card
    assert str(output_dir) not in card


def test_a_second_run_finds_everything_done(copy, recipe, finished, no_training, capsys):
    assert run_pipeline(*recipe(copy)) == finished[1]
    printed = capsys.readouterr().out
    assert printed.count(" done") == 3 + 3 + 2 and "to do" not in printed


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (
            ["--learning_rate", "0.001"],
            r"specialist of task 'list'.*made with learning_rate=0.005.*has learning_rate=0.001",
        ),
        (["--specialist_args", "{max_steps: 13}"], r"made with max_steps=12, but this run has max_steps=13"),
        (["--max_train_pairs", "8"], r"specialist of task 'list'.*made with pairs="),
        (["--lora_r", "8"], r"made with lora_r=4, but this run has lora_r=8"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(copy, recipe, no_training, flags, text):
    with pytest.raises(AMAError, match=text) as caught:
        run_pipeline(*recipe(copy, *flags))
    assert "another output_dir" in str(caught.value)


def test_full_fine_tuning(recipe, tmp_path):
    """Specialists and generalists are whole models; the figures are those of what was saved."""
    flags = ["--use_peft", "False", "--learning_rate", "1e-3", "--compare", "ama_s"]
    results = run_pipeline(*recipe(tmp_path, *flags))
    assert (tmp_path / "specialists" / "list" / "model.safetensors").is_file()
    assert (tmp_path / "generalists" / "ama_s" / "model.safetensors").is_file()
    assert results["policies"]["specialists"]["by_task"]["brief"]["accuracy"] > 0.7
    assert results["policies"]["ama_s"]["by_task"]["brief"]["loss"] < np.log(2)
    assert run_pipeline(*recipe(tmp_path, *flags)) == results


def test_every_file_of_a_run_has_its_version(finished):
    folder = finished[0]
    paths = [path for name in VERSIONS for path in folder.rglob(name) if name != "trainer_state.json"]
    assert {path.name for path in paths} == {"stage.json", "results.json", "run.json", "fingerprint.json"}
    assert all(read_json(path)["version"] == VERSIONS[path.name] for path in paths)
    state = max(folder.glob("generalists/ama_s/checkpoint-*/trainer_state.json"))
    assert read_json(state)["stateful_callbacks"]["ama"]["version"] == VERSIONS["trainer_state.json"]


@pytest.mark.parametrize("name", ["specialists/list/stage.json", "generalists/ama_s/stage.json", "results.json"])
def test_a_runs_files(copy, recipe, no_training, finished, name):
    path = copy / name
    with_version(path, 99)
    with pytest.raises(AMAError, match=refused(path.name)) as caught:
        run_pipeline(*recipe(copy))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with_version(path, None)  # as the first releases wrote it
    assert run_pipeline(*recipe(copy))["policies"] == finished[1]["policies"]


def test_a_page_leaves_out_what_is_newer(copy):
    with_version(copy / "results.json", 99)
    data = collect(copy)
    assert data["results"] is None
    assert any(
        "results.json is of version 99, newer than this trl-ama, and was left out" in text for text in data["missing"]
    )
