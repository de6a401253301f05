"""Runs on reference losses that a stranger forged: their fingerprints, numbers, rows and gaps."""

import json
import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forgery import copied, edit_note, forge, honest_table, put, readable, seal
from hub_world import SIZES, parse, write_recipe
from tiny_models import lora
from tiny_pairs import make_rows

from trl_ama import AMAError, AMATrainer, load_reference_losses, run_pipeline
from trl_ama.common.fingerprint import check_fingerprint
from trl_ama.pipeline.run_losses import joined_data, reference_losses_done
from trl_ama.recipe.fingerprint import noted_path, reference_fingerprint
from trl_ama.recipe.settings import RunSettings
from trl_ama.reference_losses.columns import LOGP_COLUMNS
from trl_ama.reference_losses.files import read_note


@pytest.fixture(scope="module")
def shared(model_dir, tmp_path_factory):
    """Honest reference losses of the model here, and the pairs they were made from."""
    place = tmp_path_factory.mktemp("shared")
    (place / "pairs").mkdir()
    for task, count in SIZES.items():
        for split, size, seed in (("train", count, 0), ("test", 10, 1)):
            lines = "".join(json.dumps(row) + "\n" for row in make_rows(task, size, seed))
            (place / "pairs" / f"{task}_{split}.jsonl").write_text(lines)
    recipe = write_recipe(place / "recipe.yaml", model_name_or_path=model_dir, tasks_dir=str(place / "pairs"))
    run_pipeline(*parse(recipe, "--output_dir", place / "run"), stages=["specialists", "losses"])
    return place


@pytest.fixture
def losses(shared, tmp_path):
    return copied(shared / "run" / "reference_losses", tmp_path)


@pytest.fixture
def run(shared, losses, model_dir, tmp_path):
    """Builds the arguments of a run on `losses`."""

    def build(own_pairs=False, **changes):
        changes = {"model_name_or_path": model_dir, "reference_losses": str(losses), **changes}
        if own_pairs:
            changes["tasks_dir"] = str(shared / "pairs")
        recipe = write_recipe(tmp_path / "recipe.yaml", () if own_pairs else ("tasks",), **changes)
        return parse(recipe, "--output_dir", tmp_path / "out")

    return build


def refused_run(arguments, *words, stages=("losses", "train")):
    with pytest.raises(AMAError) as caught:
        run_pipeline(*arguments, stages=stages)
    return readable(caught.value, *words)


def test_honest_losses_are_used(run, losses):
    run_pipeline(*run(own_pairs=True), stages=("losses", "train"))


@pytest.mark.parametrize("own_pairs", [False, True])
@pytest.mark.parametrize(
    "field, value",
    [
        ("base_model", "base@sha256:0123"), ("base_model", None), ("tokenizer", "0123"), ("max_length", 63),
        ("max_length", "64"), ("truncation_mode", "keep_end"), ("ld_alpha", 0.5), ("ld_alpha", float("nan")),
        ("dtype", "bfloat16"), ("mixed_precision", "bf16"), ("quantization", "{}"), ("attn_implementation", "eager"),
    ],
)  # fmt: skip
def test_fingerprints(run, losses, field, value, own_pairs):
    before = read_note(losses / "sort")["fingerprint"][field]
    edit_note(losses / "sort", lambda note: note["fingerprint"].update({field: value}))
    refused_run(run(own_pairs), "task 'sort'", f"{field}={value!r}", f"{field}={before!r}")


def test_fields_that_a_note_lacks(run, losses):
    edit_note(losses / "sort", lambda note: note["fingerprint"].pop("base_model") and None)
    refused_run(run(), "base_model=None")


def other_base(table):
    """The numbers of another base model, in a file and under a note that say nothing of it."""
    for column in LOGP_COLUMNS:
        table = put(column, [4 * value - 3 for value in table[column].to_pylist()])(table)
    return table


def test_numbers_of_another_base_model(run, losses, monkeypatch):
    """Everything is forged so that it fits; the policy itself, which starts at the reference, knows better."""
    for task in SIZES:
        forge(losses / task, other_base)
    steps = []
    monkeypatch.setattr("torch.optim.AdamW.step", lambda *args, **kwargs: steps.append(args))
    refused_run(run(), "differ from those of the untrained policy", "nats a token")
    assert not steps


def test_numbers_of_another_base_model_given_to_the_trainer(run, losses, model_dir, quick_args, caplog):
    """A policy of one's own may start elsewhere, so there it is a warning."""
    for task in SIZES:
        forge(losses / task, other_base)
    pairs = load_reference_losses(str(losses))["train"]
    trainer = AMATrainer(model_dir, args=quick_args(max_steps=1), train_dataset=pairs, peft_config=lora())
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "differ from those of the untrained policy" in caplog.text


def test_other_token_counts(run, losses):
    forge(losses / "list", put("chosen_tokens", [5] * SIZES["list"]))
    refused_run(run(), "'chosen_tokens' differs from this run's tokenisation")


def without_text(table):
    return table.drop_columns(["prompt", "chosen", "rejected"])


def test_rows_of_another_dataset(run, losses):
    table = honest_table("list", make_rows("list", 8, 9)).remove_columns(["prompt", "chosen", "rejected"])
    pq.write_table(table.data.table, losses / "list" / "train.parquet")
    seal(losses / "list")
    refused_run(run(own_pairs=True), f"lack {SIZES['list']} of the {SIZES['list']} pairs of task 'list'")


def test_pairs_that_are_said_to_be_dropped(run, losses, shared):
    """Only those that `DPOTrainer` drops here may be missing; a note may not take others out of a user's own data."""
    forge(losses / "list", lambda table: table.slice(2))
    ids = pq.read_table(shared / "run/reference_losses/list/train.parquet")["pair_id"].to_pylist()[:2]
    edit_note(losses / "list", lambda note: note["dropped"].update(train=ids))
    refused_run(run(own_pairs=True), "leave out 2 train pairs of task 'list'")


def test_a_million_more_rows(run, losses):
    """Under a note that was forged to fit, they cost some seconds, and change nothing."""
    before = joined_data(RunSettings(*run(own_pairs=True)))

    def change(table):
        rng = np.random.default_rng(0)
        ids = [bytes(row).hex() for row in rng.integers(0, 256, (1_000_000, 12), dtype=np.uint8)]
        more = without_text(table).take(np.zeros(len(ids), dtype=int))
        return pa.concat_tables([without_text(table), put("pair_id", ids)(more)])

    forge(losses / "list", change)
    after = joined_data(RunSettings(*run(own_pairs=True)))
    assert {split: list(rows) for split, rows in after.items()} == {
        split: list(rows) for split, rows in before.items()
    }


def test_in_16_bits_the_path_belongs_to_the_losses(shared, tmp_path):
    """Both paths round differently there, by as much as a small excess; in 32 bits they agree."""

    def noted(*arguments):
        settings = RunSettings(*parse(shared / "recipe.yaml", "--output_dir", tmp_path, *arguments))
        return reference_fingerprint(settings, settings.recipe.task_names[0]).get("prefix_sharing")

    assert noted() is noted("--prefix_sharing", "false") is None
    for sixteen in (["--dtype", "bfloat16"], ["--bf16", "true"]):
        assert noted(*sixteen) is noted(*sixteen, "--prefix_sharing", "true") is True
        assert noted(*sixteen, "--prefix_sharing", "false") is False
    # Off a CPU, `auto` leaves the fast path where it is slower
    assert [noted_path(mode, "cuda") for mode in ("auto", True, False)] == [True, "always", False]


def test_in_16_bits_the_device_belongs_to_the_losses(shared, losses, run):
    """Attention is in 32 bits on a CPU. Of files that do not say where they were made, as trl-ama 0.1 wrote them, it is not known."""

    def settings_of(**changes):
        return RunSettings(*run(own_pairs=True, **changes))

    assert "device" not in reference_fingerprint(settings_of(), "sort")
    sixteen = {"dtype": "bfloat16"}
    settings = settings_of(**sixteen)
    assert reference_fingerprint(settings, "sort")["device"] == "cpu"
    edit_note(losses / "sort", lambda note: note["fingerprint"].update(dtype="bfloat16", prefix_sharing=True))
    assert reference_losses_done(settings, "sort")
    edit_note(losses / "sort", lambda note: note["fingerprint"].update(device="cuda"))
    with pytest.raises(AMAError) as caught:
        reference_losses_done(settings, "sort")
    readable(
        caught.value,
        "task 'sort'",
        "device='cuda'",
        "device='cpu'",
        "In 16 bits",
        "run on the kind of device that made them",
    )
    # A generalist notes what its losses were made by: those that say where match those that did not, and no other place
    noted = {"reference_losses": {"sort": reference_fingerprint(settings, "sort") | {"versions": {}}}}
    old = {"reference_losses": {"sort": {**noted["reference_losses"]["sort"], "device": None}}}
    check_fingerprint(noted, old, "It was", "Mend it.")
    other = {"reference_losses": {"sort": {**noted["reference_losses"]["sort"], "device": "cuda"}}}
    with pytest.raises(AMAError, match=r"reference_losses.sort.device='cuda'.*reference_losses.sort.device='cpu'"):
        check_fingerprint(noted, other, "It was", "Mend it.")
