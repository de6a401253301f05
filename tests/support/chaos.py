"""Kills a small run at random moments, resumes it each time, and holds what it ends with against an undisturbed run, bit by bit.

    python tests/support/chaos.py --kills 25 --output outputs/chaos

Each stage (specialists, reference losses, generalist with evaluation) is run and killed with SIGKILL until it has been killed
often enough, in two ways: after a random time, or at a random one of its operations on files (in the middle of a rotation, too); then a file
that was being written is cut off at a random place first. When a stage has come to its end, all of these must be those of the undisturbed run:
adapters, every draw of every micro-batch (also those that were done again after a kill), the log with α, losses and excess of
every step, the states of strategy and sampler, reference losses and the results of the evaluation. Times are left out. Nothing half
removed or half written may be left behind.

Importing takes seconds and a kill should not: every process is forked from one that has imported everything and computed nothing.
Needs a system with fork, and no network. Prints a table, writes `chaos.json` into `--output`, and exits with 1 if anything differs.
"""

import argparse
import contextlib
import ctypes
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from places import ROOT


os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    CUDA_VISIBLE_DEVICES="",
    ACCELERATE_USE_CPU="true",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
)
SIZES = {"list": 22, "sort": 10, "brief": 14}
STAGES = {"specialists": ("specialists",), "losses": ("losses",), "train": ("train", "eval")}
RECIPE: dict[str, Any] = {
    "tasks": [{"task": task, "path": "org/data", "eval_split": "test"} for task in SIZES],
    "mixing": "ama_s",
    "mixing_lr": 0.5,
    "use_peft": True,
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_target_modules": "all-linear",
    "learning_rate": 5e-3,
    "beta": 0.5,
    "max_length": 64,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "per_device_eval_batch_size": 2,
    # Across epochs (of 12 steps, and 3 to 6 for a specialist), with checkpoints between log entries
    "max_steps": 28,
    "specialist_args": {"max_steps": 10},
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
    "logging_steps": 3,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_worst_excess",
    "greater_is_better": False,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "seed": 3,
}
# Of the log and the results, what depends on the clock
_TIMES = ("_runtime", "_per_second", "step_time")
_LIMIT = 240.0  # seconds that no process of a tiny run takes


@dataclass
class Variant:
    """One way to run: settings on top of the recipe, and processes."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    processes: int = 1


VARIANTS = {
    "plain": Variant("plain", {"dataloader_num_workers": 0}),
    # With evaluations, the best one perhaps, that no checkpoint is of
    "workers": Variant("workers", {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 2, "save_steps": 4}),
    "dropout": Variant("dropout", {"dataloader_num_workers": 0, "disable_dropout": False, "lora_dropout": 0.2}),
    "two": Variant("two", {"dataloader_num_workers": 0, "gradient_accumulation_steps": 1}, processes=2),
}


@dataclass
class Count:
    """What was done to one stage, and what came of it."""

    variant: str
    stage: str
    kills: int = 0
    by_time: int = 0
    at_files: int = 0
    in_saves: int = 0  # that left a checkpoint, shard or table half written
    ends: int = 0  # undisturbed ends that were compared
    equal: bool = True
    differences: list[str] = field(default_factory=list)
    seconds: float = 0.0


# ---- Processes ----


def fork(target: Callable[[], None], log: Path, environ: dict[str, str] | None = None) -> int:
    """Run `target` in a fork of this process, in a group of its own; what it prints goes to `log`."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        die_with_parent()
        os.environ.update(environ or {})
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        target()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # not the parent's clean-up


def die_with_parent() -> None:
    """Where the system can do that: a suite that is stopped leaves nobody behind."""
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    except (AttributeError, OSError):
        pass


def kill(pids: list[int]) -> None:
    """Kill processes with their data loaders, and wait until they are gone."""
    for pid in pids:
        try:
            os.killpg(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
    for pid in pids:
        try:
            os.waitpid(pid, 0)
        except ChildProcessError:
            pass


def wait(pids: list[int], seconds: float) -> list[int | None]:
    """Exit codes after at most so many seconds, or as soon as one has failed; `None` for a process that goes on."""
    codes: dict[int, int] = {}
    end = time.monotonic() + seconds
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        if any(codes.values()) or time.monotonic() > end:
            break
        time.sleep(0.005)
    return [codes.get(pid) for pid in pids]


def one_after_another(target: Callable[[], None], log: Path, what: str) -> None:
    """Run `target` in a fork and wait for its good end."""
    [code] = wait([pid := fork(target, log)], _LIMIT)
    kill([pid] if code is None else [])
    if code != 0:
        raise SystemExit(f"{what} failed ({code}):\n{log.read_text()[-4000:]}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ---- The run ----


def make_world(home: Path) -> None:
    """A tiny model, its tokenizer and pairs of every task."""
    from tiny_models import make_model, make_tokenizer, save
    from tiny_pairs import make_rows

    tokenizer = make_tokenizer()
    save(make_model(len(tokenizer)), tokenizer, home / "model")
    (home / "data").mkdir()
    for task, count in SIZES.items():
        for split, size, seed in (("train", count, 0), ("test", 5, 1)):
            rows = make_rows(task, size, seed)
            (home / "data" / f"{task}_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_stages(home: Path, folder: Path, variant: Variant, stages: tuple[str, ...]) -> None:
    """Some stages of the pipeline; every draw is noted in `draws.log`."""
    import datasets
    from transformers import Trainer
    from trl import ModelConfig, TrlParser

    from trl_ama import AMAConfig, TaskMixtureConfig, run_pipeline
    from trl_ama.recipe.arguments import PipelineArguments
    from trl_ama.reference_losses import shards as loss_shards

    datasets.config.HF_DATASETS_CACHE = home / "cache"
    loss_shards.SHARD_SECONDS = 0.0
    recipe = {**RECIPE, "model_name_or_path": str(home / "model"), "tasks_dir": str(home / "data"), **variant.settings}
    path = home / f"{variant.name}.json"
    if not path.exists():
        path.write_text(json.dumps(recipe))
    parser = TrlParser((PipelineArguments, AMAConfig, ModelConfig, TaskMixtureConfig))
    arguments = parser.parse_args_and_config(["--config", str(path), "--output_dir", str(folder)])

    draws = os.open(folder.parent / f"draws-{os.environ.get('RANK', '0')}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    training_step, counted = Trainer.training_step, {}

    def noting(self, model, inputs, *args, **kwargs):
        place = (Path(self.args.output_dir).name, self.state.global_step)
        counted[place] = counted.get(place, -1) + 1
        # Tokens say which pairs they are, and in which order
        content = hash(tuple(map(tuple, inputs["input_ids"].tolist())))
        os.write(draws, f"{place[0]} {place[1]} {counted[place]} {content}\n".encode())
        return training_step(self, model, inputs, *args, **kwargs)

    Trainer.training_step = noting
    run_pipeline(*arguments, stages=stages)


def start(home: Path, folder: Path, variant: Variant, stage: str, log: Path, fatal: dict | None = None) -> list[int]:
    """Fork the processes of a stage; `fatal` says at which operation on files one of them kills itself."""
    port = free_port() if variant.processes > 1 else 0
    pids = []
    for rank in range(variant.processes):
        environ = {}
        if variant.processes > 1:
            environ = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(variant.processes), "MASTER_PORT": str(port),
                "LOCAL_WORLD_SIZE": str(variant.processes), "MASTER_ADDR": "127.0.0.1",
            }  # fmt: skip

        def target(rank=rank):
            if fatal is not None and rank == 0:
                die_at_file(folder, **fatal)
            run_stages(home, folder, variant, STAGES[stage])

        pids.append(fork(target, log, environ))
    return pids


# ---- Kills ----


def die_at_file(folder: Path, number: int, keep: float) -> None:
    """Kill this process at its n-th operation on a file of the run.

    Args:
        folder (`Path`): The run.
        number (`int`): Which operation: opening a file to write, renaming, removing, or what torch and safetensors write.
        keep (`float`): What share of a file stays that torch or safetensors were writing.
    """
    import safetensors.torch
    import torch

    inside, done, process = str(folder), 0, os.getpid()

    def is_last() -> bool:
        nonlocal done
        done += os.getpid() == process  # not a data loader's
        return done == number

    def die() -> None:
        os.killpg(os.getpgid(0), signal.SIGKILL)

    def watch(event: str, args: tuple) -> None:
        if event == "open":
            path, mode, flags = args
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and isinstance(path, (str, bytes)) and os.fsdecode(path).startswith(inside) and is_last():
                die()
        elif event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"):
            if (
                isinstance(args[0], (str, bytes, os.PathLike))
                and place_of(event, args).startswith(inside)
                and is_last()
            ):
                die()

    def place_of(event: str, args: tuple) -> str:
        path = os.fsdecode(args[0])
        if event in ("os.remove", "os.rmdir") and not os.path.isabs(path) and args[1] >= 0:
            # In the middle of removing a folder, as a rotated checkpoint: files are named from it
            with contextlib.suppress(OSError):
                return os.path.join(os.readlink(f"/proc/self/fd/{args[1]}"), path)
        return path

    def cutting(function, place):
        def cut(*args, **kwargs):
            function(*args, **kwargs)
            path = kwargs.get("filename", args[place] if len(args) > place else None)
            if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(inside) and is_last():
                os.truncate(path, int(os.path.getsize(path) * keep))
                die()

        return cut

    sys.addaudithook(watch)
    torch.save = cutting(torch.save, 1)
    safetensors.torch.serialize_file = cutting(safetensors.torch.serialize_file, 1)


def half_written(folder: Path) -> bool:
    """Whether a kill has left something that is not whole."""
    for manifest in folder.glob("*/*/checkpoint-*"):
        try:
            if not json.loads((manifest / "ama_files.json").read_text())["complete"]:
                return True
        except (OSError, ValueError, KeyError):
            return True
    return any(
        True for pattern in ("**/.*.tmp", "**/.*.partial", "**/.checkpoint-*.removed") for _ in folder.glob(pattern)
    )


# ---- What must be equal ----


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(entry) for key, entry in value.items() if not key.endswith(_TIMES)}
    return [without_times(entry) for entry in value] if isinstance(value, list) else value


def what_it_is(folder: Path) -> dict[str, Any]:
    """Everything of a run that must not depend on how often it was stopped."""
    import hashlib

    import pyarrow.parquet as pq

    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*s/*/adapter_model.safetensors")):
        found[f"adapter {path.parent.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(folder.glob("*s/*/trainer_state.json")):
        state = json.loads(path.read_text())
        mixture = state["stateful_callbacks"].get("ama")
        found[f"log of {path.parent.name}"] = without_times(state["log_history"])
        found[f"state of {path.parent.name}"] = [
            mixture, state["global_step"], state["epoch"], state["best_global_step"], state["best_metric"], state["total_flos"],
        ]  # fmt: skip
    for path in sorted(folder.glob("*s/*/stage.json")):
        found[f"result of {path.parent.name}"] = without_times(json.loads(path.read_text())["result"])
    for path in sorted(folder.glob("reference_losses/[!.]*/*.parquet")):
        found[f"losses {path.parent.name} {path.stem}"] = pq.read_table(path).to_pydict()
    if (folder / "results.json").exists():
        found["results"] = json.loads((folder / "results.json").read_text())["policies"]
        found["margins"] = pq.read_table(folder / "held_out_margins.parquet").to_pydict()
    return json.loads(json.dumps(found))


def left_behind(folder: Path) -> list[str]:
    """What should not be there when a stage is done: parts of checkpoints, and files that never got their name."""
    from trl_ama.training.checkpoints import half_of

    halves = [path for path in folder.glob("*/*/checkpoint-*") if half_of(path) is not None]
    found = [*halves, *(path for ending in ("partial", "removed") for path in folder.glob(f"**/.*.{ending}"))]
    return [str(path.relative_to(folder)) for path in found]


def draws_of(folder: Path) -> dict[str, set[str]]:
    """Rank, stage, step and micro-batch → what was drawn for it, by all processes that came so far."""
    found: dict[str, set[str]] = {}
    for path in sorted(folder.glob("draws-*.log")):
        for line in path.read_text().splitlines():
            place, _, content = line.rpartition(" ")
            found.setdefault(f"{path.stem} {place}", set()).add(content)
    return found


def differences(folder: Path, expected: dict[str, Any], expected_draws: dict[str, set[str]]) -> list[str]:
    found, drawn = what_it_is(folder), draws_of(folder.parent)
    names = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
    names += [f"draws of {place}" for place, content in drawn.items() if content != expected_draws.get(place)]
    return names


# ---- The suite ----


def disturb(
    home: Path, before: Path, variant: Variant, stage: str, kills: int, rng: random.Random, expected: Path
) -> Count:
    """Run a stage to its end again and again, each time killed at random, until it was killed often enough."""
    count, begun = Count(variant.name, stage), time.monotonic()
    place = home / f"{variant.name}-{stage}"
    reference, reference_draws = json.loads(expected.read_text()), draws_of(before.parent)
    setup, operations = 0.5, 20  # of a first guess; what processes need is learned on the way
    while count.kills < kills:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        run, log = place / "run", place / "log.txt"
        copy_before(before, run, stage)
        while True:
            fatal, patience = None, _LIMIT
            if count.kills < kills:
                if rng.random() < 0.5:
                    fatal = {"number": 1 + int(rng.random() * operations), "keep": rng.random()}
                else:
                    patience = rng.uniform(0.3, 1.0) * setup * 2
            started = time.monotonic()
            pids = start(home, run, variant, stage, log, fatal)
            codes = wait(pids, patience)
            time.sleep(rng.random() * 0.02 if variant.processes > 1 else 0)
            kill([pid for pid, code in zip(pids, codes, strict=True) if code is None])
            if all(code == 0 for code in codes):
                break
            # Of two processes, the one that is left may fail when the other is gone
            if any(code not in (None, 0, -signal.SIGKILL) for code in codes) and -signal.SIGKILL not in codes:
                raise SystemExit(f"{variant.name}, {stage}: exit codes {codes}\n{log.read_text()[-6000:]}")
            if patience == _LIMIT and fatal is None:
                raise SystemExit(f"{variant.name}, {stage}: hangs\n{log.read_text()[-6000:]}")
            count.kills += 1
            count.by_time += fatal is None
            count.at_files += fatal is not None
            count.in_saves += half_written(run)
            lasted = time.monotonic() - started
            setup = max(setup, min(lasted, 4.0)) if fatal is not None else setup * 1.03
            operations = min(operations + 3, 120)
        count.ends += 1
        found = differences(run, reference, reference_draws)
        found += [f"left behind: {name}" for name in left_behind(run)]
        count.differences += found
        count.equal = count.equal and not found
        if found:
            break
    count.seconds = round(time.monotonic() - begun, 1)
    return count


def copy_before(whole: Path, run: Path, stage: str) -> None:
    """What a stage finds: all that the stages before it have made."""
    names = {"specialists": (), "losses": ("specialists",), "train": ("specialists", "reference_losses")}[stage]
    run.mkdir()
    for name in names:
        shutil.copytree(whole / name, run / name)


def undisturbed(home: Path, variant: Variant) -> Path:
    """The reference run; its draws and what it is are left beside it."""
    place = home / f"{variant.name}-undisturbed"
    place.mkdir()
    run, log = place / "run", place / "log.txt"
    for stage in STAGES:
        codes = wait(pids := start(home, run, variant, stage, log), _LIMIT)
        kill([pid for pid, code in zip(pids, codes, strict=True) if code is None])
        if any(codes) or None in codes:
            raise SystemExit(f"The undisturbed run failed in '{stage}' ({codes}):\n{log.read_text()[-6000:]}")
        (place / f"{stage}.json").write_text(json.dumps(what_it_is(run)))
    return run


def import_everything() -> None:
    """All that a run imports, in the process that is forked; nothing is computed, so that no thread is started."""
    import matplotlib.pyplot  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch
    import torch.distributed  # noqa: F401
    from peft import LoraConfig, PeftModel  # noqa: F401
    from peft.tuners import lora  # noqa: F401
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, Trainer  # noqa: F401
    from trl import DPOTrainer  # noqa: F401

    import trl_ama.pipeline.generalists  # noqa: F401
    import trl_ama.pipeline.run  # noqa: F401
    import trl_ama.report.page  # noqa: F401

    torch.set_num_threads(1)  # the environment says so, too, if it was read after that


def main(argv: list[str] | None = None) -> int:
    """Run the suite. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=25, help="SIGKILLs of each stage")
    parser.add_argument(
        "--variants", nargs="+", choices=list(VARIANTS), default=["plain", "workers", "dropout", "two"]
    )
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--steps", type=int, default=RECIPE["max_steps"], help="of the generalist; an epoch has 12")
    parser.add_argument("--specialist_steps", type=int, default=RECIPE["specialist_args"]["max_steps"])
    parser.add_argument(
        "--tasks", type=int, default=len(SIZES), help="how many of the three; an epoch of two has 8 steps"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder for chaos.json")
    parser.add_argument("--keep", action="store_true", help="keep the runs, and say where they are")
    args = parser.parse_args(argv)
    RECIPE.update(
        max_steps=args.steps, specialist_args={"max_steps": args.specialist_steps}, tasks=RECIPE["tasks"][: args.tasks]
    )

    home = Path(tempfile.mkdtemp(prefix="chaos_"))
    os.environ.update(HF_HOME=str(home / "hf"), PYTHONHASHSEED="0", MPLCONFIGDIR=str(home / "mpl"))
    sys.path.insert(0, str(ROOT))
    from kept import keep_and_freeze  # late: it imports what reads the environment

    import_everything()
    keep_and_freeze()
    counts: list[Count] = []
    try:
        one_after_another(lambda: make_world(home), home / "world.txt", "Making model and data")
        for name in args.variants:
            variant = VARIANTS[name]
            whole = undisturbed(home, variant)
            for stage in args.stages:
                rng = random.Random(f"{args.seed} {name} {stage}")
                expected = whole.parent / f"{stage}.json"
                counts.append(disturb(home, whole, variant, stage, args.kills, rng, expected))
                print(as_row(counts[-1]), flush=True)
    finally:
        if args.keep:
            print(f"Runs: {home}")
        else:
            shutil.rmtree(home, ignore_errors=True)
    report = {"seed": args.seed, "stages": [asdict(count) for count in counts], "equal": all(c.equal for c in counts)}
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "chaos.json").write_text(json.dumps(report, indent=2) + "\n")
    print("All equal." if report["equal"] else "Something differs from the undisturbed run.")
    if args.kills >= 25 and not any(count.in_saves for count in counts):
        print("No kill left anything half written, so that saves were not tried.")
        return 1
    return 0 if report["equal"] else 1


def as_row(count: Count) -> str:
    end = "equal" if count.equal else "DIFFERENT: " + ", ".join(count.differences[:6])
    return (
        f"{count.variant:<8} {count.stage:<12} {count.kills:>3} kills ({count.by_time} by time, {count.at_files} at a file, "
        f"{count.in_saves} in a save), {count.ends} ends, {count.seconds:.0f} s: {end}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
