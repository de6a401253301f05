"""Rows of every form through the whole pipeline: trained on, scored, published, and found again from the user's own rows."""

import json

import numpy as np
import pytest
import torch
from corpus_rows import WEATHER, assistant, call, implicit, pair
from datasets import load_dataset
from hub_world import parse, upload_model, write_recipe
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from trl_ama import join_reference_losses, load_reference_losses, run_pipeline
from trl_ama.common.files import read_json
from trl_ama.tasks.forms import with_prompt, without_nulls


LOSSES = "org/mine-reference-losses"


def text(task, number):
    return {"prompt": f"{task} {number}: ", "chosen": f"yes, {number}", "rejected": f"no {number}"}


def text_without_prompt(task, number):
    row = text(task, number)
    return {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}


def messages(task, number):
    return pair(f"{task} {number}?", f"yes, {number}", "no")


def calls(task, number):
    answer = assistant(None, tool_calls=[call("weather", {"city": f"town {number}"})])
    return pair(f"{task} {number}?", answer, "no", tools=[WEATHER] if number % 3 else None)


KINDS = {
    "texts": {"given": text, "none": text_without_prompt},
    "messages": {
        "given": messages,
        "none": lambda *row: implicit(messages(*row)),
        "calls": calls,
        "calls_none": lambda *row: implicit(calls(*row)),
    },
}


@pytest.fixture
def rows_of(tmp_path):
    """Writes a task's files. Task → split → rows."""

    def write(kind, tasks):
        rows = {}
        for task, row in [(task, row) for task, row in KINDS[kind].items() if task in tasks]:
            rows[task] = {
                "train": [row(task, number) for number in range(6)],
                "test": [row(task, number) for number in (7, 8, 9)],
            }
            for split, part in rows[task].items():
                (tmp_path / f"{task}_{split}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in part))
        return rows

    return write


_logps: dict = {}


def logps_of_base(folder, tmp_path, rows, loaded):
    """Summed log-probs of both answers under the base, of the tokens that a plain `DPOTrainer` makes. Split → (N, 2)"""
    key = json.dumps(rows)
    if key not in _logps:  # the rows of a form are the same with its texts saved and without
        args = DPOConfig(str(tmp_path / "plain"), max_length=None, bf16=False, use_cpu=True, report_to="none")
        trainer = DPOTrainer(folder, args=args, train_dataset=loaded["train"], eval_dataset=loaded["test"])
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        parts = {"train": trainer.train_dataset, "test": trainer.eval_dataset}
        _logps[key] = {split: sums_of(model, prepared) for split, prepared in parts.items()}
    return _logps[key]


def sums_of(model, prepared):
    sums = []
    for row in prepared:
        for side in ("chosen_ids", "rejected_ids"):
            ids = torch.tensor([row["prompt_ids"] + row[side]])
            with torch.no_grad():
                logps = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
            sums.append(logps[len(row["prompt_ids"]) - 1 :].sum().item())
    return np.array(sums).reshape(-1, 2)


def train_losses(run):
    return [
        entry["loss"]
        for entry in read_json(run / "generalists/ama_s/trainer_state.json")["log_history"]
        if "loss" in entry
    ]


@pytest.mark.parametrize("include_text", [True, False], ids=["texts saved", "ids alone"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_form(hub, rows_of, kind, include_text, letters_dir, tmp_path, monkeypatch):
    upload_model(hub, letters_dir)
    rows = rows_of(
        kind, KINDS[kind] if include_text else ("given", "calls_none", "none")[: 2 if kind == "messages" else 3]
    )
    files = {task: {split: str(tmp_path / f"{task}_{split}.jsonl") for split in own} for task, own in rows.items()}
    recipe = {
        "tasks": [
            {"task": task, "path": "json", "data_files": own, "eval_split": "test"} for task, own in files.items()
        ],
        "max_length": None,
        "max_steps": 2,
        "specialist_args": {"max_steps": 2, "learning_rate": 0.02},
        "include_text": include_text,
    }
    push = {"push_to_hub": True, "hub_model_id": "org/mine"}
    stages = ("specialists", "losses", "train", "eval") if include_text else ("specialists", "losses")
    path = write_recipe(tmp_path / "first.yaml", **recipe, **push, output_dir=str(tmp_path / "first"))
    run_pipeline(*parse(path), stages=stages)

    losses = load_reference_losses(LOSSES)
    assert losses.tasks == list(rows)
    for task, own in rows.items():
        loaded = load_dataset("json", data_files=files[task])
        expected_logps = logps_of_base(letters_dir, tmp_path, own, loaded)
        for split, part in own.items():
            raw = loaded[split]
            joined = join_reference_losses(raw.add_column("task", [task] * len(raw)), losses[split])
            ours = np.stack([joined["ref_chosen_logps"][:], joined["ref_rejected_logps"][:]], axis=1)
            np.testing.assert_allclose(ours, expected_logps[split], rtol=1e-5)
            assert (np.abs(np.array(joined["specialist_chosen_logps"][:]) - ours[:, 0]) > 1e-3).all()
            saved = losses.parts[task].splits[split]
            texts = [name for name in ("prompt", "chosen", "rejected", "tools") if name in saved.column_names]
            assert bool(texts) == include_text
            for row, given in zip(saved, part, strict=True):
                expected = {**with_prompt(given), "tools": given.get("tools")}
                assert all(without_nulls(row[name]) == without_nulls(expected[name]) for name in texts)

    # From the Hub: with one's own copy of the pairs, or without one. Nothing is trained or scored again
    monkeypatch.setattr("trl_ama.pipeline.losses.score_reference_and_specialist", lambda *args: pytest.fail("scored"))
    run, without = tmp_path / "second", ("tasks",) if include_text and kind == "messages" else ()
    path = write_recipe(tmp_path / "second.yaml", without, **recipe, reference_losses=LOSSES, output_dir=str(run))
    run_pipeline(*parse(path), stages=("specialists", "losses", "train"))
    assert not (run / "specialists").exists()
    if include_text:
        assert train_losses(run) == pytest.approx(train_losses(tmp_path / "first"), rel=1e-6)
    assert len(train_losses(run)) == 2
