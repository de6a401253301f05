"""What `trl ama-plan` foresees of the steps that were measured, against what they took."""

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from gpu_cases import GIB, lora, model_config, nf4
from gpu_parts import PARTS
from gpu_report import NotHere, Report

from trl_ama.plan.empty_model import MemorySettings
from trl_ama.plan.memory import training_memory


def memory(report: Report) -> None:
    """Of each model the case that took most. A plan takes up to half a minute of one core, so they are made side by side."""
    measured: list[tuple[str, dict]] = []
    for name in PARTS:
        if name.startswith("steps-"):
            measured += _measured(report.path.with_name(f"{name}.json"))
    if not measured:
        raise NotHere("no steps were measured before")
    by_model = {plan["model"]: (case, plan) for case, plan in sorted(measured, key=lambda one: one[1]["measured"])}
    workers = 1 if report.rehearse else len(by_model)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        plans = [(case, pool.submit(compared, plan)) for case, plan in by_model.values()]
        for case, plan in plans:
            with report.row(case) as row:
                row |= plan.result(timeout=max(1.0, report.left))


def _measured(path: Path) -> list[tuple[str, dict]]:
    if not path.exists():
        return []
    notes = json.loads(path.read_text())["notes"]
    return [(case, plan) for case, plan in notes.items() if isinstance(plan, dict) and "measured" in plan]


def compared(plan: dict) -> dict:
    """The plan of a case, and how far it is from what was measured."""
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
