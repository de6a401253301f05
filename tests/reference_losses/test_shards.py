"""A sweep that is stopped goes on where it was, with the same numbers; shards that are not this run's own are not used."""

import logging
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from accelerate import PartialState
from hub_world import HELD_OUT, SIZES, parse, write_pairs, write_recipe
from peft import LoraConfig
from ready import Job
from saved_adapters import save_adapter

from trl_ama import AMAError, run_pipeline
from trl_ama.common.files import read_json, write_json
from trl_ama.dpo import sweep
from trl_ama.dpo.pair_trainer import ScoringTrainer
from trl_ama.dpo.scoring import score_pairs
from trl_ama.policies.switching import reference_policy, trained_policy
from trl_ama.recipe.settings import RunSettings
from trl_ama.reference_losses import shards as loss_shards
from trl_ama.reference_losses.columns import LOGP_COLUMNS
from trl_ama.reference_losses.files import tasks_in
from trl_ama.reference_losses.shards import LossShards
from trl_ama.scripts.ama_losses import main, make_parser
from trl_ama.scripts.common import run_script


pytestmark = pytest.mark.slow


# ---- Shards alone ----

IDS = [f"{number:024x}" for number in range(20)]
RUN = {"task": "list", "base_model": "base@sha256:aa", "max_length": 64}


def empty() -> dict[str, np.ndarray]:
    return {"logps": np.zeros(20, dtype=np.float32), "tokens": np.zeros(20, dtype=np.int32)}


def full() -> dict[str, np.ndarray]:
    return {"logps": -np.arange(1, 21, dtype=np.float32) / 3, "tokens": np.arange(20, dtype=np.int32)}


PARTS = [[19, 3, 7], [0, 1, 2, 4], [5, 6]]


@pytest.fixture
def folder(tmp_path):
    """Three shards of a run, which hold 9 of 20 rows."""
    PartialState()  # accelerate's logger asks it who is the main process
    shards = LossShards(tmp_path / ".list.shards", RUN, IDS)
    for rows in PARTS:
        shards.add(np.array(rows), full())
        shards.save()
    return tmp_path / ".list.shards"


def files(folder) -> list[Path]:
    return sorted(folder.glob("*.parquet"))


def loaded(folder, fingerprint=RUN, ids=IDS):
    scores = empty()
    done = LossShards(folder, fingerprint, ids).load(scores)
    return set(np.flatnonzero(done)), scores


def test_what_was_saved_is_read_again(folder):
    rows, scores = loaded(folder)
    assert rows == {row for part in PARTS for row in part}
    for name, values in full().items():
        np.testing.assert_array_equal(scores[name], np.where(np.isin(np.arange(20), list(rows)), values, 0))
        assert scores[name].dtype == values.dtype
    assert len(files(folder)) == 3
    assert not [name for file in files(folder) for name in pq.read_schema(file).names if name in ("prompt", "chosen")]


def test_rows_are_saved_when_the_last_shard_is_old_enough(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(loss_shards.time, "monotonic", lambda: now[0])
    with LossShards(tmp_path / "s", RUN, IDS) as shards:
        for row in range(7):
            now[0] += 25
            shards.add(np.array([row]), full())
        assert len(files(tmp_path / "s")) == 2  # after 75 and 150 seconds
    assert loaded(tmp_path / "s")[0] == set(range(7))  # the end saves the rest, and so does an error
    with pytest.raises(ZeroDivisionError), LossShards(tmp_path / "s", RUN, IDS) as shards:
        shards.add(np.array([9]), full())
        raise ZeroDivisionError
    assert 9 in loaded(tmp_path / "s")[0]


def test_processes_write_side_by_side(folder):
    """For a sweep that several processes share: rows say where they belong."""
    other = LossShards(folder, RUN, IDS, rank=1)
    other.add(np.array([8, 18]), full())
    other.save()
    rows, scores = loaded(folder)
    assert rows == {row for part in [*PARTS, [8, 18]] for row in part}
    assert scores["tokens"][18] == 18


def flip(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


DAMAGES = {
    "cut off": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "no Parquet": lambda content: b"x" * len(content),
    **{f"bit {part}": lambda content, part=part: flip(content, len(content) * part // 10) for part in range(10)},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_named_and_not_used(folder, caplog, damage):
    path = files(folder)[1]
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        rows, scores = loaded(folder)
    assert rows == {*PARTS[0], *PARTS[2]} and (scores["logps"][PARTS[1]] == 0).all()
    lines = [record.getMessage() for record in caplog.records if record.name == "trl_ama.reference_losses.shards"]
    assert len(lines) == 1 and "\n" not in lines[0] and str(path) in lines[0] and "damaged" in lines[0]
    assert not path.exists()


def others(tmp_path, fingerprint=RUN, ids=IDS, scores=None) -> Path:
    shards = LossShards(tmp_path / "others", fingerprint, ids)
    shards.add(np.array([10, 11]), scores or full())
    shards.save()
    return files(tmp_path / "others")[0]


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"fingerprint": {**RUN, "max_length": 32}}, "another run"),
        ({"ids": IDS[::-1]}, "other pairs"),
        ({"ids": [*IDS, *(name[::-1] + "x" for name in IDS)]}, "other pairs"),
        ({"scores": {**full(), "logps": np.full(20, np.nan, dtype=np.float32)}}, "not finite"),
    ],
)
def test_a_shard_of_something_else_is_named_and_not_used(folder, tmp_path, caplog, kwargs, reason):
    if len(kwargs.get("ids", ())) > 20:  # a row that this run does not have
        shards = LossShards(tmp_path / "others", RUN, kwargs["ids"])
        shards.add(np.array([30]), {name: np.resize(values, 40) for name, values in full().items()})
        shards.save()
        path = files(tmp_path / "others")[0]
    else:
        path = others(tmp_path, **kwargs)
    shutil.copy(path, folder / path.name)
    with caplog.at_level(logging.WARNING):
        rows, _ = loaded(folder)
    assert rows == {row for part in PARTS for row in part}
    lines = [record.getMessage() for record in caplog.records if record.name == "trl_ama.reference_losses.shards"]
    assert len(lines) == 1 and path.name in lines[0] and reason in lines[0]


def test_shards_of_another_sweep_of_the_run_stay_for_it(folder, caplog):
    """Where base and specialist take turns, each finds its own."""
    scores = {"other_logps": np.zeros(20, dtype=np.float32)}
    assert not LossShards(folder, RUN, IDS).load(scores).any()
    assert not caplog.records and len(loaded(folder)[0]) == 9


def test_what_a_kill_left_half_written_goes(folder):
    (folder / ".000-00003-abc.parquet.tmp").write_bytes(b"PAR1")
    assert len(loaded(folder)[0]) == 9
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".parquet", ".parquet", ".parquet"]


def test_other_settings_are_refused(folder):
    with pytest.raises(AMAError, match=r"unfinished.*made with max_length=64, but this run has max_length=32.*delete"):
        LossShards(folder, {**RUN, "max_length": 32}, IDS)
    renamed = {**RUN, "base_model": "copy-of-base@sha256:aa", "versions": {"torch": "9"}}
    assert len(loaded(folder, renamed)[0]) == 9  # the same weights under another name


# ---- A run that is stopped ----


def killed_losses(place: str, number: int, *flags) -> None:
    """What the script that `trl ama-losses` launches does, killed: in its n-th forward pass, or while it writes its n-th shard."""
    calls = 0

    def killing(function, counts=lambda *args: True):
        def killed(*args, **kwargs):
            nonlocal calls
            calls += counts(*args)
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return killed

    if place == "forward":
        sweep.packed_forward = killing(sweep.packed_forward)
    else:
        loss_shards.os.replace = killing(os.replace, lambda source, target: str(target).endswith(".parquet"))
    loss_shards.SHARD_SECONDS = 0.0
    sys.argv = ["ama_losses.py", *map(str, flags)]
    run_script("ama-losses", make_parser, main)


@pytest.fixture(scope="module")
def world(model_dir, tmp_path_factory):
    """A recipe whose specialists are there: one that is switched off exactly, one that is not. With its finished run."""
    home = tmp_path_factory.mktemp("world")
    write_pairs(home)
    kinds = {"list": True, "sort": "pissa"}
    specialists = {
        task: save_adapter(
            home / f"{task}-adapter",
            model_dir,
            LoraConfig(r=4, init_lora_weights=init, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        for task, init in kinds.items()
    }
    recipe = write_recipe(
        home / "config.yaml",
        model_name_or_path=model_dir,
        tasks=[{"task": task} for task in SIZES],
        tasks_dir=str(home),
        specialists=specialists,
        per_device_eval_batch_size=2,
    )
    with pytest.MonkeyPatch.context() as patch:
        forwards = count_forwards(patch)
        run_pipeline(*parse(recipe, "--output_dir", home / "run"), stages=("losses",))
    return recipe, home / "run" / "reference_losses", len(forwards)


def count_forwards(monkeypatch, fail_at: int | None = None) -> list[int]:
    """Tokens of every batch that a model ran on, without the trials of whether it can take the fast path."""
    seen: list[int] = []
    forward = sweep.packed_forward

    def counted(model, pairs, **kwargs):
        seen.append(pairs.input_ids.numel())
        if len(seen) == fail_at:
            raise MemoryError("as if out of memory")
        return forward(model, pairs, **kwargs)

    monkeypatch.setattr(sweep, "packed_forward", counted)
    return seen


def tables(folder) -> dict[str, dict]:
    return {
        str(path.relative_to(folder)): pq.read_table(path).to_pydict()
        for path in sorted(folder.glob("[!.]*/*.parquet"))
    }


def shards_of(folder) -> list[Path]:
    return sorted(folder.glob(".*.shards/*.parquet"))


def test_the_numbers_are_those_of_two_plain_passes(world, tmp_path):
    recipe, folder, _ = world
    settings = RunSettings(*parse(recipe, "--output_dir", folder.parent))
    assert tasks_in(folder) == list(SIZES)
    for task in SIZES:
        rows = {row: i for i, row in enumerate(tables(folder)[f"{task}/train.parquet"]["pair_id"])}
        trainer = ScoringTrainer(
            settings.recipe.model_name,
            args=settings.recipe.with_arguments(
                prefix_sharing=False, precompute_ref_log_probs=True, output_dir=str(tmp_path)
            ),
            train_dataset=settings.inputs.pairs_of(task, "train"),
        )
        with reference_policy(trainer) as model:
            base = score_pairs(trainer, model, trainer.train_dataset, "")
        with trained_policy(trainer, "it", settings.specialist_source(task)) as model:
            own = score_pairs(trainer, model, trainer.train_dataset, "")
        order = [rows[name] for name in trainer.train_dataset["pair_id"]]
        ours = {name: np.array(values) for name, values in tables(folder)[f"{task}/train.parquet"].items()}
        expected = [base["chosen_logps"], base["rejected_logps"], own["chosen_logps"], own["rejected_logps"]]
        for name, values in zip(LOGP_COLUMNS, expected, strict=True):
            np.testing.assert_allclose(ours[name][order], values, rtol=1e-4)
        np.testing.assert_array_equal(ours["rejected_tokens"][order], own["rejected_tokens"])


def test_a_finished_run_leaves_no_shards(world):
    assert sorted(path.name for path in world[1].iterdir()) == sorted(SIZES)


def test_killed_twice_and_run_to_the_end(world, tmp_path, monkeypatch):
    """Real processes, really killed: in the middle of the second task, and again while a shard is written."""
    recipe, finished, forwards = world
    run, printed = tmp_path / "run", tmp_path / "printed"
    have = 0
    for moment in (("forward", forwards // 4), ("replace", 3)):
        job = Job(killed_losses, *moment, "--config", str(recipe), "--output_dir", str(run), folder=printed)
        assert job.wait() == -signal.SIGKILL, job.stdout + job.stderr
        assert not (run / "reference_losses" / "list").exists()
        shards = shards_of(run / "reference_losses")
        assert len(shards) > have  # the first had none to begin with, the second went on
        have = len(shards)
    before = {path: path.stat().st_mtime_ns for path in shards}
    assert list(
        (run / "reference_losses" / ".list.shards").glob("*.tmp")
    )  # it was killed before this one got its name
    scored = {name for path in shards for name in pq.read_table(path)["pair_id"].to_pylist()}
    assert 0 < len(scored) < SIZES["list"] + HELD_OUT

    monkeypatch.setattr(loss_shards, "SHARD_SECONDS", 0.0)
    seen = count_forwards(monkeypatch)
    saved = []
    monkeypatch.setattr(LossShards, "add", spy(LossShards.add, saved, before))
    run_pipeline(*parse(recipe, "--output_dir", run), stages=("losses",))
    assert len(seen) == forwards - 2 * have  # there was a shard for every batch, and none of them came again
    assert tables(run / "reference_losses") == tables(finished)
    assert sorted(path.name for path in (run / "reference_losses").iterdir()) == sorted(SIZES)


def spy(add, saved, before):
    """`LossShards.add`, looking on whether the shards of earlier processes are still what they were."""

    def spying(self, rows, scores):
        if self.folder.name == ".list.shards":
            assert all(path.stat().st_mtime_ns == modified for path, modified in before.items())
        saved.extend(rows)
        add(self, rows, scores)

    return spying


@pytest.mark.parametrize("moment", ["first", "early", "middle", "late", "last"])
def test_an_error_at_any_moment_costs_nothing_that_was_finished(world, tmp_path, monkeypatch, moment):
    """Also in the second task, whose base and specialist are two sweeps; with time for no shard but the one at the end."""
    recipe, finished, forwards = world
    at = {"first": 1, "early": forwards // 5, "middle": forwards // 2, "late": forwards * 4 // 5, "last": forwards}
    with monkeypatch.context() as patch:
        count_forwards(patch, at[moment])
        with pytest.raises(MemoryError):
            run_pipeline(*parse(recipe, "--output_dir", tmp_path), stages=("losses",))
    seen = count_forwards(monkeypatch)
    run_pipeline(*parse(recipe, "--output_dir", tmp_path), stages=("losses",))
    # Of the batch in which it happened, the base's pass may have been done
    assert forwards - at[moment] + 1 <= len(seen) <= forwards - at[moment] + 2
    assert tables(tmp_path / "reference_losses") == tables(finished)


@pytest.fixture(scope="module")
def stopped_once(world, tmp_path_factory):
    recipe, _, forwards = world
    run = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_shards, "SHARD_SECONDS", 0.0)
        count_forwards(patch, forwards // 3)
        with pytest.raises(MemoryError):
            run_pipeline(*parse(recipe, "--output_dir", run), stages=("losses",))
    return run


@pytest.fixture
def stopped(stopped_once, tmp_path, monkeypatch):
    """A run that stopped in its first task, a shard for every batch."""
    monkeypatch.setattr(loss_shards, "SHARD_SECONDS", 0.0)
    shutil.copytree(stopped_once, tmp_path / "run")
    return tmp_path / "run" / "reference_losses"


def test_a_damaged_shard_is_scored_again(stopped, world, caplog, capsys, monkeypatch):
    """In the batch that it was in: which pairs are scored together is not decided by what is there."""
    path = shards_of(stopped)[1]
    lost = pq.read_table(path)["row"].to_pylist()
    batches, add = [], LossShards.add
    monkeypatch.setattr(
        LossShards, "add", lambda self, rows, scores: (batches.append(rows.tolist()), add(self, rows, scores))
    )
    there = sum(pq.read_metadata(other).num_rows for other in shards_of(stopped) if other != path)
    path.write_bytes(path.read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        run_pipeline(*parse(world[0], "--output_dir", stopped.parent), stages=("losses",))
    assert [path.name in record.getMessage() for record in caplog.records if "shards" in record.name] == [True]
    assert batches[0] == lost
    assert f"{there} of {SIZES['list'] + HELD_OUT} pairs were scored before" in capsys.readouterr().out
    assert tables(stopped) == tables(world[1])


def test_a_shard_of_another_task_is_not_used(stopped, world, caplog):
    path = shards_of(stopped)[1]
    (stopped / ".sort.shards").mkdir()
    shutil.copy(path, stopped / ".sort.shards")
    with caplog.at_level(logging.WARNING):
        run_pipeline(*parse(world[0], "--output_dir", stopped.parent), stages=("losses",))
    assert [record.getMessage().count("another run") for record in caplog.records if "shards" in record.name] == [1]
    assert tables(stopped) == tables(world[1])


def test_another_batch_size_goes_on_with_what_is_there(stopped, world, monkeypatch):
    """As after an out-of-memory: the numbers are the same but for rounding."""
    there = sum(pq.read_metadata(path).num_rows for path in shards_of(stopped))
    rows = []
    monkeypatch.setattr(LossShards, "add", spy(LossShards.add, rows, {}))
    flags = ["--output_dir", stopped.parent, "--per_device_eval_batch_size", 1]
    run_pipeline(*parse(world[0], *flags), stages=("losses",))
    assert there > 0 and len(rows) == SIZES["list"] + HELD_OUT - there + 2 * (SIZES["sort"] + HELD_OUT)
    for name, table in tables(world[1]).items():
        for column in LOGP_COLUMNS:
            np.testing.assert_allclose(tables(stopped)[name][column], table[column], rtol=1e-4)


def test_other_settings_are_refused_before_anything_is_done(stopped, world, monkeypatch):
    monkeypatch.setattr(
        "trl_ama.pipeline.losses.score_reference_and_specialist", lambda *args: pytest.fail("pairs were scored")
    )
    flags = ["--output_dir", stopped.parent, "--max_length", 32]
    with pytest.raises(
        AMAError, match="unfinished reference losses.*list.*max_length=64, but this run has max_length=32"
    ):
        run_pipeline(*parse(world[0], *flags), stages=("losses",))
    assert shards_of(stopped)


def test_shards_are_no_task_and_go_with_the_finished_files(stopped, world):
    """Also those that a run left which was stopped between saving the task and removing them."""
    assert tasks_in(stopped) == [] and os.listdir(stopped) == [".list.shards"]
    left = stopped / ".list.shards"
    shutil.copytree(left, stopped.parent / "kept")
    run_pipeline(*parse(world[0], "--output_dir", stopped.parent), stages=("losses",))
    assert not left.exists()
    shutil.copytree(stopped.parent / "kept", left)
    run_pipeline(*parse(world[0], "--output_dir", stopped.parent), stages=("losses",))
    assert not left.exists() and tasks_in(stopped) == list(SIZES)
    note = read_json(stopped.parent / "kept" / "run.json")
    write_json(left / "run.json", {**note, "fingerprint": {**note["fingerprint"], "max_length": 7}})
    run_pipeline(*parse(world[0], "--output_dir", stopped.parent), stages=("losses",))  # what is finished counts
