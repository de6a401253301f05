"""Runs that an earlier version was stopped in are continued, reported, merged and published; `tests/data/old_run` holds them."""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from datasets import load_dataset
from hub_world import parse
from peft import PeftModel
from places import TESTS
from transformers import AutoModelForCausalLM
from trl import DPOTrainer

from trl_ama import cli, load_reference_losses, run_pipeline


OLD = TESTS / "data" / "old_run"
SIZES = {"list": 12, "sort": 6}
HELD_OUT, STEPS, STOPPED_AT = 4, 6, 3
# Another CPU adds float32 numbers in another order: log-probs here are of magnitude 16, of which the last place is 2e-6. Without
# the vector instructions that made the files the run ends within 1e-6; without the optimizer's state it is off by 2e-2
CLOSE = {"rel": 1e-5, "abs": 1e-5}


def copied(run: str, home: Path) -> Path:
    """The model, the pairs and one of the runs, as they were when it was stopped."""
    for name in ("model", "data"):
        shutil.copytree(OLD / name, home / name)
    shutil.copy(OLD / "recipe.yaml", home)
    shutil.copytree(OLD / run, home / "run")
    return home


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """The folder of a run that was stopped in its second generalist; all paths in its files are from the folder it is in."""
    monkeypatch.chdir(copied("stopped_in_training", tmp_path))
    return tmp_path / "run"


def digests(folder: Path) -> dict[str, str]:
    """Of every file that nobody writes anew from what the others hold, as cards and pages are."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("README.md", "mixture.png")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def finished_parts(run: Path) -> dict[str, dict[str, str]]:
    return {part: digests(run / part) for part in ("specialists", "reference_losses", "generalists/ama_r")}


def numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """All numbers in nested dicts and lists, by where they are."""
    if isinstance(value, (dict, list)):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from numbers(entry, f"{name}/{key}")
    elif isinstance(value, (int, float)):
        yield name, value


def log_of(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


@pytest.fixture(scope="module")
def continued(tmp_path_factory):
    """The run, what was finished of it, the micro-batches that were trained on when it was continued, and its results."""
    home, batches = copied("stopped_in_training", tmp_path_factory.mktemp("old_run")), []
    before, step = finished_parts(home / "run"), DPOTrainer.training_step

    def counted(self, *args, **kwargs):
        batches.append((Path(self.args.output_dir).name, self.state.global_step))
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr(DPOTrainer, "training_step", counted)
        results = run_pipeline(*parse(Path("recipe.yaml")))
    return home / "run", before, batches, results


def test_what_was_finished_is_not_done_again(continued):
    run, before, batches, _ = continued
    assert finished_parts(run) == before and all(before.values())
    assert list(dict.fromkeys(batches)) == [("ama_s", step) for step in range(STOPPED_AT, STEPS)]


def test_the_stopped_generalist_goes_on_from_its_checkpoint(continued):
    run = continued[0]
    log = log_of(run / "generalists/ama_s")
    assert log[:STOPPED_AT] == log_of(OLD / f"stopped_in_training/generalists/ama_s/checkpoint-{STOPPED_AT}")
    assert [entry["step"] for entry in log] == [*range(1, STEPS + 1), STEPS]
    assert json.loads((run / "generalists/ama_s/stage.json").read_text())["result"]["steps"] == STEPS


def test_it_ends_as_the_undisturbed_run_of_the_version_before(continued):
    """With the same figures, so with the same optimizer, learning rate, draws, mixture weights and reference losses."""
    expected = json.loads((OLD / "undisturbed.json").read_text())
    run, _, _, results = continued
    assert results == json.loads((run / "results.json").read_text())
    log = [
        {key: entry.get(key) for key in old}
        for old, entry in zip(expected["log"], log_of(run / "generalists/ama_s"), strict=True)
    ]
    assert dict(numbers(log)) == pytest.approx(dict(numbers(expected["log"])), **CLOSE)
    assert dict(numbers(results["policies"])) == pytest.approx(dict(numbers(expected["policies"])), **CLOSE)
    # Which would not hold of any training: the other strategy ends with others
    ends = [expected["policies"][name]["by_task"]["sort"]["margin"] for name in ("ama_r", "ama_s")]
    assert not math.isclose(*ends, rel_tol=10 * CLOSE["rel"], abs_tol=10 * CLOSE["abs"])


def test_a_sweep_that_was_stopped_goes_on_with_the_shards(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(copied("stopped_in_losses", tmp_path))
    (shard,) = (tmp_path / "run/reference_losses/.sort.shards").glob("*.parquet")
    scored = pq.read_table(shard).to_pydict()
    run_pipeline(*parse(Path("recipe.yaml")), stages=("losses",))
    assert (
        f"Reference losses, sort: {len(scored['row'])} of {SIZES['sort'] + HELD_OUT} pairs were scored before."
        in capsys.readouterr().out
    )
    assert digests(tmp_path / "run/specialists") == digests(OLD / "stopped_in_losses/specialists")
    for split in ("train", "test"):
        new, old = (
            pq.read_table(run / "reference_losses/sort" / f"{split}.parquet").to_pydict()
            for run in (tmp_path / "run", OLD / "stopped_in_training")
        )
        for name, values in old.items():
            known = np.isin(old["pair_id"], scored["pair_id"])
            assert [value for value, there in zip(new[name], known, strict=True) if there] == [
                value for value, there in zip(values, known, strict=True) if there
            ]
            if isinstance(values[0], float):
                np.testing.assert_allclose(new[name], values, rtol=CLOSE["rel"], atol=CLOSE["abs"])
            else:
                assert new[name] == values
    assert not shard.parent.exists()


def test_reference_losses_are_loaded(stopped):
    losses = load_reference_losses(stopped / "reference_losses")
    assert losses.tasks == list(SIZES)
    assert {split: len(rows) for split, rows in losses.items()} == {
        "train": sum(SIZES.values()),
        "test": HELD_OUT * len(SIZES),
    }
    assert {"prompt", "chosen", "rejected", "pair_id", "specialist_chosen_logps"} <= set(losses["train"].column_names)


def test_the_page_of_the_stopped_run(stopped, capsys):
    (stopped / "report/index.html").unlink()
    assert cli.main(["ama-report", str(stopped)]) == 0
    assert f"Page: {stopped / 'report/index.html'}" in capsys.readouterr().out
    page = (stopped / "report/index.html").read_text()
    assert f"not finished, last checkpoint at step {STOPPED_AT}" in page and f"done, {STEPS} steps" in page
    assert all(name in page for name in (*SIZES, "ama_r", "ama_s"))


def test_the_finished_generalist_is_merged(stopped):
    assert cli.main(["ama-merge", "--config", "recipe.yaml", "--output", "merged"]) == 0
    base, merged = (AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32) for name in ("model", "merged"))
    tokens = torch.arange(4, base.config.vocab_size)[None]
    with torch.no_grad():
        plain = base(input_ids=tokens).logits
        adapted = PeftModel.from_pretrained(base, stopped / "generalists/ama_r").eval()(input_ids=tokens).logits
        torch.testing.assert_close(merged.eval()(input_ids=tokens).logits, adapted, rtol=1e-5, atol=1e-5)
    assert (adapted - plain).abs().max() > 0.01


def test_it_is_published_without_any_of_it_being_made_again(stopped, hub, monkeypatch):
    monkeypatch.setattr(DPOTrainer, "training_step", lambda *args, **kwargs: pytest.fail("something was trained"))
    recipe = yaml.safe_load(Path("recipe.yaml").read_text()) | {
        "compare": [],
        "push_to_hub": True,
        "hub_model_id": "org/old",
    }
    Path("push.yaml").write_text(yaml.safe_dump(recipe))
    before = finished_parts(stopped)
    run_pipeline(*parse(Path("push.yaml")), stages=("specialists", "losses", "train"))
    assert finished_parts(stopped) == before
    for folder, name in [*((f"specialists/{task}", f"old-{task}") for task in SIZES), ("generalists/ama_r", "old")]:
        tree, weights = hub.tree("model", f"org/{name}"), "adapter_model.safetensors"
        assert tree[weights] == (stopped / folder / weights).read_bytes()
        assert "README.md" in tree and not [path for path in tree if path.startswith("checkpoint")]
    pushed, ours = load_dataset("org/old-reference-losses"), load_reference_losses(stopped / "reference_losses")
    for split, rows in ours.items():
        assert pushed[split].to_dict() == rows.with_format(None).to_dict()
