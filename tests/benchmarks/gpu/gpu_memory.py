"""What `trl ama-plan` foresees of the steps that were measured, against what they took."""

import json
from pathlib import Path

import torch
from gpu_cases import GIB, lora, model_config, nf4
from gpu_parts import PARTS
from gpu_report import NotHere, Report

from trl_ama.plan.empty_model import MemorySettings
from trl_ama.plan.memory import training_memory


def memory(report: Report) -> None:
    """Of each model's cases in turn, those that took most first: a plan takes up to half a minute of the processor."""
    measured = []
    for name in PARTS:
        if name.startswith("steps-"):
            measured += _measured(report.path.with_name(f"{name}.json"))
    if not measured:
        raise NotHere("no steps were measured before")
    # Round by round over the models: the largest case of each, then the second
    by_model: dict[str, list[tuple[str, dict]]] = {}
    for case, plan in sorted(measured, key=lambda one: -one[1]["measured"]):
        by_model.setdefault(plan["model"], []).append((case, plan))
    rounds = max(map(len, by_model.values()))
    for turn in range(1 if report.rehearse else rounds):
        for cases in by_model.values():
            if turn < len(cases) and (turn == 0 or report.left > 15):
                with report.row(cases[turn][0]) as row:
                    row |= _compared(cases[turn][1])


def _measured(path: Path) -> list[tuple[str, dict]]:
    if not path.exists():
        return []
    notes = json.loads(path.read_text())["notes"]
    return [(case, plan) for case, plan in notes.items() if isinstance(plan, dict) and "measured" in plan]


def _compared(plan: dict) -> dict:
    settings = MemorySettings(
        dtype=torch.bfloat16,
        autocast=torch.bfloat16,
        quantization=nf4() if plan["quantised"] else None,
        peft_config=lora(),
        gradient_checkpointing=plan["checkpoints"],
        optim=plan["optim"],
        device="cuda",
    )
    pairs = [tuple(pair) for pair in plan["pairs"]]
    found = training_memory(
        model_config(plan["model"]), settings, pairs, max_length=plan["max_length"], common=plan["common"]
    )
    row = {"planned GiB": found.peak / GIB, "weights GiB": found.weights / GIB, "packed": found.packed}
    if plan["measured"]:
        row |= {"measured GiB": plan["measured"] / GIB, "planned / measured": found.peak / plan["measured"]}
    return row
