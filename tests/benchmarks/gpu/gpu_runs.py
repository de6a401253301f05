"""Whole runs on a card: resumed bit by bit, sharded by FSDP2, the quickstart, what a step makes the host wait for, and tests/gpu."""

import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
import xml.etree.ElementTree as ET
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_card import CUDA, synchronize
from gpu_cases import HALF, free, made_model, made_pairs, trainer_of
from gpu_report import Report
from places import RECIPES, ROOT
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback
from trl import DPOTrainer


STEPS, SAVED = 8, 4
LAUNCHES = {"cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx"}


def _trained(folder: str, resume: bool = False, adapter: bool = True, **settings: Any) -> DPOTrainer:
    """A run of a few steps of a tiny model with a checkpoint in the middle, from the start or from that checkpoint."""
    known = {
        "output_dir": folder,
        "max_steps": STEPS,
        "save_steps": SAVED,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "gradient_checkpointing": False,
        "bf16": CUDA,
    }
    data = made_pairs(64, 64, beginning=10)
    trainer = trainer_of("ours", made_model("tiny", torch.float32), data, 64, adapter, **{**known, **settings})
    trainer.train(resume_from_checkpoint=os.path.join(folder, f"checkpoint-{SAVED}") if resume else None)
    return trainer


def _weights(trainer: DPOTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu() for name, value in trainer.model.named_parameters() if value.requires_grad}


def _run(command: list[str], report: Report, **variables: str) -> None:
    """Run a program for at most the time that is left. What it says goes into a file beside the report, its last line into an error."""
    said = report.path.with_name(f"{report.path.stem}-program.log")
    with open(said, "w") as output:
        to = {"stdout": output, "stderr": subprocess.STDOUT, "env": {**os.environ, **variables}}
        try:
            code = subprocess.run(command, cwd=ROOT, timeout=max(5, report.left), **to).returncode
            ended = f"exit code {code}" if code else None
        except subprocess.TimeoutExpired as error:
            ended = f"not done after {error.timeout:.0f} s"
    if ended:
        lines = said.read_text(errors="replace").strip().splitlines()
        raise RuntimeError(f"{ended}; its last line: {lines[-1] if lines else 'nothing'}")


# ---- Resuming ----


def resume(report: Report) -> None:
    """The same run once whole and once from its checkpoint; without `full_determinism` it is told how far apart they come out."""
    for deterministic in (True, False):
        with report.row("full_determinism" if deterministic else "without it") as row:
            folder = tempfile.mkdtemp(prefix="gpu_figures-")
            whole = _weights(_trained(folder, full_determinism=deterministic))
            trainer = _trained(folder, resume=True, full_determinism=deterministic)
            again = _weights(trainer)
            row["largest difference"] = max(float((whole[name] - again[name]).abs().max()) for name in whole)
            row["same bits"] = all(torch.equal(whole[name], again[name]) for name in whole)
            row |= trainer.prefix_sharing.taken
        torch.use_deterministic_algorithms(False)


# ---- FSDP2 ----


def fsdp(report: Report) -> None:
    """Full fine-tuning, sharded, in the one process that `accelerate launch` has started; on a CPU nothing is sharded."""
    folder = tempfile.mkdtemp(prefix="gpu_figures-")
    with report.row(f"{STEPS} steps and a checkpoint") as row:
        trainer = _trained(folder, adapter=False)
        row |= {"wrapped as": type(trainer.model_wrapped).__name__, **trainer.prefix_sharing.taken}
        row["distributed"] = str(trainer.accelerator.distributed_type).rpartition(".")[2]
        rows = [trainer.train_dataset[number] for number in range(4)]
        batch = trainer._prepare_inputs(trainer.data_collator(rows))
        call = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
        with torch.no_grad():
            found = trainer.model_wrapped(**call, labels=batch["input_ids"], fused_lm_head=True)
        row["log-probs"] = str(found.log_probs.dtype)[6:]  # sums of them are wrong by nats in 16 bits
    with report.row("resumed") as row:
        again = _trained(folder, resume=True, adapter=False)
        row |= {"step": again.state.global_step, **again.prefix_sharing.taken}


# ---- The quickstart ----


def quickstart(report: Report) -> None:
    """The quickstart's recipe as it is, with a base that was warmed up for fewer steps and a few steps of each training."""
    folder = Path(tempfile.mkdtemp(prefix="gpu_figures-"))
    with report.row("base and pairs") as row:
        spec = importlib.util.spec_from_file_location("prepare", RECIPES / "quickstart" / "prepare.py")
        prepare = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(prepare)
        prepare.warm_up = partial(prepare.warm_up, steps=2 if report.rehearse else 100)
        if report.rehearse:
            prepare.TRAIN_PAIRS, prepare.TEST_PAIRS = {"list": 32, "brief": 32, "sort": 16}, 8
        start = time.perf_counter()
        prepare.prepare(folder)
        row["seconds"] = time.perf_counter() - start
    with report.row("trl ama") as row:
        command = [sys.executable, "-m", "trl_ama", "ama"]
        command += ["--config", str(RECIPES / "quickstart" / "ama" / "config_lora.yaml")]
        command += ["--model_name_or_path", str(folder / "model"), "--tasks_dir", str(folder / "data")]
        command += ["--output_dir", str(folder / "run"), "--use_cpu", "false" if CUDA else "true"]
        command += ["--max_steps", "2" if report.rehearse else "15"]
        command += ["--compare", "proportional"] if report.rehearse else []
        start = time.perf_counter()
        _run(command, report)
        row |= {"seconds": time.perf_counter() - start, "results.json": (folder / "run" / "results.json").exists()}


# ---- Waits and launches ----


class Watch(TrainerCallback):
    """When steps end, where the host waited for the card in one of them, and what was launched in another."""

    def __init__(self, counted: int | None):
        self.counted = counted  # the first of two steps that are watched; their time is not that of others
        self.ends: list[float] = []
        self.waits: Counter[str] = Counter()
        self.launches, self.kernels = 0, 0.0
        self._open: Any = None

    def on_step_begin(self, args, state, control, **kwargs):
        if not CUDA or self.counted is None:
            return
        if state.global_step == self.counted:
            self._open = warnings.catch_warnings(record=True)
            self._seen = self._open.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        elif state.global_step == self.counted + 1:
            self._open = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
            self._open.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        opened, self._open = self._open, None
        if isinstance(opened, profile):
            synchronize()
            opened.__exit__(None, None, None)
            events = opened.key_averages()
            self.launches = sum(event.count for event in events if event.key in LAUNCHES)
            self.kernels = sum(event.self_device_time_total for event in events) / 1e3
        elif opened is not None:
            torch.cuda.set_sync_debug_mode("default")
            opened.__exit__(None, None, None)
            found = [one for one in self._seen if "synchronizing CUDA operation" in str(one.message)]
            self.waits = Counter(f"{'/'.join(Path(one.filename).parts[-3:])}:{one.lineno}" for one in found)
        if state.global_step == state.max_steps:
            synchronize()  # else the last steps would not count
        self.ends.append(time.perf_counter())


def waits(report: Report) -> None:
    """Runs of 135M as `train()` makes them, whose host may run ahead of the card: ours and TRL's in turn."""
    name, batch, length, steps = ("tiny", 2, 32, 6) if report.rehearse else ("135M", 8, 256, 16)
    case = f"{name}, {batch} pairs of up to {length}"
    seconds: dict[str, list[float]] = {"ours": [], "trl": []}
    for turn in range(3):  # one that is watched, and two that are timed
        if turn >= 2 and report.left < 10:
            break
        for kind in seconds:
            watch = Watch(steps - 3 if turn == 0 else None)
            settings = {"per_device_train_batch_size": batch, "max_steps": steps, "save_strategy": "no", "bf16": CUDA}
            data = made_pairs(steps * batch, length)
            trainer = trainer_of(kind, made_model(name, HALF), data, length, logging_steps=steps, **settings)
            if kind == "trl":
                trainer.precompute_ref_logps = True
            trainer.add_callback(watch)
            trainer.train()
            if turn == 0:
                with report.row(f"{case}: {kind}") as row:
                    if kind == "ours":
                        row |= trainer.prefix_sharing.taken
                    if CUDA:
                        row |= {"host waits": sum(watch.waits.values()), "launches": watch.launches}
                        row["kernels ms"] = watch.kernels
                        report.note(f"where {kind} waits", dict(watch.waits.most_common()))
            else:
                half = watch.ends[steps // 2 - 1 :]
                seconds[kind].append((half[-1] - half[0]) / (steps - steps // 2))
            del trainer
            free()
    with report.row(f"{case}: a step of a run") as row:
        ours, trl = (1e3 * statistics.median(values) for values in seconds.values())
        row |= {"ours ms": ours, "trl ms": trl, "ours / trl": ours / trl}


# ---- tests/gpu ----


def card_tests(report: Report) -> None:
    """The tests that are marked `gpu`, one row for each that did not pass."""
    results = report.path.with_name("tests.xml")
    results.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", f"--junitxml={results}"]
    if report.rehearse:
        command += ["-k", "Llama or True-float32"]
    with report.row("all") as row:
        try:
            _run(
                [*command, str(ROOT / "tests" / "gpu")], report, **({"TRL_AMA_CARD": "cpu"} if report.rehearse else {})
            )
        finally:
            cases = list(ET.parse(results).getroot().iter("testcase")) if results.exists() else []
            outcome = Counter(_outcome(case) for case in cases)
            row |= {name: outcome[name] for name in ("passed", "not passed", "skipped")}
        if not outcome["passed"]:
            raise RuntimeError("no test has run")
    for case in cases:
        if _outcome(case) == "not passed":
            with report.row(case.get("name", "?")):
                raise AssertionError(next(iter(case)).get("message"))


def _outcome(case: ET.Element) -> str:
    kinds = {child.tag for child in case}
    return "not passed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
