"""Runs the same cases in 1, 2 and 4 real processes (gloo, CPU) and writes what came out; `test_processes.py` compares.

    python tests/support/processes_worker.py FOLDER [PROCESSES …]

FOLDER has what the tests' fixture put there. Everything is imported once, and the processes are forked from that one.
"""

import json
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace


# Global batch of every case, and rows whose last step of an epoch has 3: two of four processes then have no pair of it
BATCH, EPOCHS, SECONDS = 8, 2, 240
# Pairs of a window of a streamed task, fewer than any task has, and steps, in which every task is passed over more than once
BUFFER, STEPS = 5, 8
SAVED_AT = 6  # the step that resumed runs go on from: in the second epoch, or pass


def main(folder: Path, counts: list[int]) -> int:
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers.trainer  # noqa: F401
    from kept import keep_and_freeze

    import trl_ama.dpo.ama_trainer
    import trl_ama.pipeline.run  # noqa: F401

    torch.set_num_threads(1)
    keep_and_freeze()
    later = sorted({count for case in LATER.values() for count in case.counts if {1, 2} <= {*counts}})
    for count, cases in [*((count, CASES) for count in counts), *((count, LATER) for count in later)]:
        began = time.monotonic()
        if not run_group(folder, count, cases):
            return 1
        print(f"{count} processes: {time.monotonic() - began:.1f} s", flush=True)
    if "jobs" in json.loads((folder / "spec.json").read_text()):
        return 0 if run_jobs(folder) else 1
    return 0


def run_group(folder: Path, count: int, cases: dict) -> bool:
    """Run the cases in `count` processes; whether all went well."""
    return group(count, lambda rank: work(folder, count, rank, cases))


def group(count: int, function) -> bool:
    """Call a function with its rank in each of `count` processes that know of each other; whether all went well."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]

    def process(rank):
        if count > 1:
            names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
            os.environ |= dict(zip(names, map(str, (rank, rank, count, count)), strict=True))
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        function(rank)

    return together([lambda rank=rank: process(rank) for rank in range(count)])


def together(functions) -> bool:
    """Call each function in a process of its own, at the same time; whether all went well."""
    children = []
    for function in functions:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                function()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    deadline = time.monotonic() + SECONDS
    good, left = True, set(children)
    while left:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            left.discard(child)
            good = good and status == 0
        if (not good or time.monotonic() > deadline) and left:
            good = False
            for other in left:
                os.kill(other, signal.SIGKILL)
        time.sleep(0.02)
    return good


def work(folder: Path, count: int, rank: int, cases: dict) -> None:
    """All cases in one of `count` processes; the first writes `<count>.json` and `<count>-<case>.npz`."""
    world = SimpleNamespace(folder=folder, count=count, rank=rank, spec=json.loads((folder / "spec.json").read_text()))
    results = {}
    for name, case in cases.items():
        if count in case.counts:
            began = time.process_time()
            results[name] = case.run(world, name)
            if rank == 0 and os.environ.get("TRL_AMA_TIMES"):
                print(f"  {name}: {time.process_time() - began:.1f} s of a core", flush=True)
    if rank == 0:
        path = folder / f"{count}.json"
        known = json.loads(path.read_text()) if cases is LATER else {}
        path.write_text(json.dumps({**known, **results}))


# ---- Jobs side by side ----


def run_jobs(folder: Path) -> bool:
    """One job for each task, all at once in one output folder, then one for the rest; beside a run that does all by itself.

    And a run of two processes that finds a specialist of that one and makes the rest.
    """
    spec = json.loads((folder / "spec.json").read_text())
    jobs = [["--only_tasks", task] for task in spec["jobs"]]
    if not (
        together([lambda flags=flags: pipeline(spec, folder / "jobs", *flags) for flags in jobs])
        and together([lambda: pipeline(spec, folder / "jobs", "--compare", "proportional", said=folder / "said.txt")])
        and together([lambda: pipeline(spec, folder / "alone", "--compare", "proportional")])
    ):
        return False
    copy_specialist(folder / "alone", folder / "two", spec["jobs"][0])
    return group(2, lambda rank: pipeline(spec, folder / "two", *spec["two"]))


def copy_specialist(run: Path, copy: Path, task: str) -> None:
    shutil.copytree(run / "specialists" / task, copy / "specialists" / task)


def pipeline(spec, output_dir, *flags, said=None):
    import contextlib

    from trl import ModelConfig, TrlParser

    from trl_ama import AMAConfig, TaskMixtureConfig
    from trl_ama.pipeline.run import run_pipeline
    from trl_ama.recipe.arguments import PipelineArguments

    parser = TrlParser((PipelineArguments, AMAConfig, ModelConfig, TaskMixtureConfig))
    arguments = parser.parse_args_and_config(["--config", spec["recipe"], "--output_dir", str(output_dir), *flags])
    with contextlib.ExitStack() as stack:
        if said is not None:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(said, "w"))))
        run_pipeline(*arguments)


# ---- What the cases share ----


def pairs(world, in_memory=True):
    from datasets import load_from_disk

    return load_from_disk(str(world.folder / "pairs"), keep_in_memory=in_memory)


def streams(world):
    """The same pairs, each task's as a stream of its own."""
    rows = pairs(world)
    numbers = {}
    for number, task in enumerate(rows["task"]):
        numbers.setdefault(task, []).append(number)
    return {task: rows.select(own).to_iterable_dataset() for task, own in numbers.items()}


def without_columns(dataset, start=("ref_", "specialist_")):
    return dataset.remove_columns([name for name in dataset.column_names if name.startswith(start)])


def arguments(world, name, **changes):
    from trl_ama import AMAConfig

    settings = {
        **world.spec["quick"],
        "output_dir": str(world.folder / f"{world.count}-{name}"),
        "per_device_train_batch_size": BATCH // world.count,
        "num_train_epochs": EPOCHS,
        **changes,
    }
    return AMAConfig(**settings)


def adapter():
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")


def recording(base):
    """A trainer class that notes which pairs of each optimizer step counted in this process, by their reference log-probs."""
    from trl_ama.dpo.pair_batches import COUNTED

    class Recording(base):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if self.model.training and "ref_chosen_logps" in inputs:
                ids = inputs["ref_chosen_logps"].tolist()
                own = inputs.get(COUNTED, (len(ids),))[0]
                self.drawn = getattr(self, "drawn", {})
                self.drawn.setdefault(self.state.global_step, []).extend(ids[:own])
            return super().compute_loss(model, inputs, *args, **kwargs)

    return Recording


def outcome(world, name, trainer):
    """What a training left: its log, the pairs of each step over all processes, and the weights in a file."""
    import numpy as np
    from accelerate.utils import gather_object

    drawn = gather_object([getattr(trainer, "drawn", {})])
    steps = sorted({step for part in drawn for step in part})
    weights = {key: value.detach().numpy() for key, value in trainer.model.named_parameters() if value.requires_grad}
    if world.rank == 0:
        np.savez(world.folder / f"{world.count}-{name}.npz", **weights)
    skipped = gather_object([trainer.clipped_pairs.skipped if hasattr(trainer, "clipped_pairs") else 0])
    return {
        "log": trainer.state.log_history,
        "skipped": sum(skipped),
        "drawn": [sorted(value for part in drawn for value in part.get(step, ())) for step in steps],
    }


# ---- The cases ----


def ama_trainer(world, name, data=pairs, **settings):
    from trl_ama import AMATrainer

    return recording(AMATrainer)(
        world.spec["model"],
        args=arguments(world, name, **settings),
        train_dataset=data(world),
        peft_config=adapter(),
    )


def training(counts=(1, 2, 4), **settings):
    def run(world, name):
        trainer = ama_trainer(world, name, **settings)
        trainer.train()
        return outcome(world, name, trainer)

    return SimpleNamespace(run=run, counts=counts)


def specialist(world, name):
    """Plain DPO on the fast path, whose reference log-probs are computed before training, of data in memory and on disk."""
    import numpy as np

    from trl_ama.dpo.pair_trainer import SpecialistTrainer

    result = {}
    for place, in_memory in (("memory", True), ("disk", False)):
        trainer = SpecialistTrainer(
            world.spec["model"],
            args=arguments(
                world,
                f"{name}-{place}",
                precompute_ref_log_probs=True,
                num_train_epochs=1,
                per_device_eval_batch_size=4,
            ),
            train_dataset=without_columns(pairs(world, in_memory)).remove_columns("task"),
            peft_config=adapter(),
        )
        assert bool(trainer.train_dataset.cache_files) and {"ref_chosen_logps"} <= {
            *trainer.train_dataset.column_names
        }
        trainer.train()
        result[place] = outcome(world, f"{name}-{place}", trainer)
        result[place]["reference"] = np.asarray(trainer.train_dataset["ref_chosen_logps"][:]).tolist()
    return result


def resumed(**settings):
    """A run from a checkpoint in the middle of its second epoch, against the run that wrote the checkpoint."""

    def run(world, name):
        ends = []
        checkpoints = [None, str(checkpoint_of(world, world.count, name))]
        for checkpoint in checkpoints[: world.count]:  # in one process, test_invariants.py does that
            trainer = ama_trainer(world, name, save_strategy="steps", save_steps=SAVED_AT, **settings)
            trainer.train(resume_from_checkpoint=checkpoint)
            ends.append(outcome(world, f"{name}-{len(ends)}", trainer))
        return ends

    return SimpleNamespace(run=run, counts=(1, 2), settings=settings)


def checkpoint_of(world, count, name):
    return world.folder / f"{count}-{name}" / f"checkpoint-{SAVED_AT}"


def handed_over(name):
    """What one process has begun is ended by two, and the other way round; and what is said if a step had other pairs."""

    def run(world, own_name):
        from accelerate.utils import gather_object

        from trl_ama import AMAError

        settings = CASES[name].settings
        checkpoint = str(checkpoint_of(world, 3 - world.count, name))
        other_batch = BATCH // 2 if world.count == 1 else BATCH  # of the run that wrote it, in each process
        said = "nothing"
        try:
            trainer = ama_trainer(world, own_name, per_device_train_batch_size=other_batch, **settings)
            trainer.train(resume_from_checkpoint=checkpoint)
        except AMAError as error:
            said = str(error)
        trainer = ama_trainer(world, own_name, **settings)
        trainer.train(resume_from_checkpoint=checkpoint)
        return {"refused": gather_object([said]), **outcome(world, own_name, trainer)}

    return SimpleNamespace(run=run, counts=(1, 2))


def scoring(world, name):
    """Log-probs of all pairs, on both paths, with a model that needs no other process and one that does."""
    import numpy as np
    import torch

    from trl_ama.dpo import sweep
    from trl_ama.dpo.pair_trainer import PairTrainer
    from trl_ama.dpo.scoring import score_pairs

    class NotWhole(PairTrainer):
        def _precompute_ref_logps(self, dataset, name, batch_size):
            return dataset

    for path in ("auto", False):
        trainer = NotWhole(
            world.spec["model"],
            args=arguments(
                world, name, precompute_ref_log_probs=True, prefix_sharing=path, per_device_eval_batch_size=2
            ),
            train_dataset=without_columns(pairs(world)),
        )
        forwards = []
        ours = score_pairs(trainer, trainer.model, trainer.train_dataset, "")
        if world.count > 1:
            # As a sharded model: a forward pass that some processes make and others do not never comes to its end
            def wait_for_others(module, args, forwards=forwards):
                forwards.append(1)
                torch.distributed.barrier()

            handle = trainer.model.register_forward_pre_hook(wait_for_others)
            before, sweep.is_sharded = sweep.is_sharded, lambda accelerator: True
            try:
                again = score_pairs(trainer, trainer.model, trainer.train_dataset, "")
            finally:
                sweep.is_sharded = before
                handle.remove()
            for key, values in ours.items():
                np.testing.assert_array_equal(again[key], values)
            assert forwards
        if world.rank == 0:
            np.savez(world.folder / f"{world.count}-{name}-{path}.npz", **ours)
    return shards(world, trainer, ours)


def shards(world, trainer, expected):
    """A sweep that is saved as it goes, and one that finds a part of it; the batches of each process in both."""
    import contextlib
    import functools

    import numpy as np
    from accelerate.utils import gather_object

    from trl_ama.common.processes import from_main
    from trl_ama.dpo import scoring, sweep
    from trl_ama.reference_losses.shards import LossShards

    folder, ids = world.folder / f"{world.count}-shards", [str(row) for row in range(len(trainer.train_dataset))]
    plain, batches, counts = sweep.Sweep.score, [], []
    policies = {"": functools.partial(contextlib.nullcontext, trainer.model)}

    def counted(self, rows, *args, **kwargs):
        batches.append(len(rows))
        return plain(self, rows, *args, **kwargs)

    sweep.Sweep.score = counted
    try:
        for lost in (0, 1):
            if lost:
                from_main(lambda: [path.unlink() for path in sorted(folder.glob("*.parquet"))[:1]])
            batches.clear()
            own = LossShards(folder, {"run": 1}, ids, trainer.accelerator.process_index)
            ours = scoring.score_policies(trainer, policies, trainer.train_dataset, "", own)
            for key, values in expected.items():
                np.testing.assert_array_equal(ours[key], values)
            counts.append(gather_object([list(batches)]))
            names = from_main(lambda: sorted(path.name[:9] for path in folder.glob("*.parquet")))
            counts[-1] = {"batches": counts[-1], "files": names}
    finally:
        sweep.Sweep.score = plain
    return counts


def errors(world, name):
    """What goes wrong in the main process goes wrong in all, with the same sentence."""
    from accelerate.utils import gather_object

    from trl_ama import AMAError
    from trl_ama.common.processes import from_main, main_first

    def wrong():
        raise AMAError("The folder 'x' is not there. Make it.")

    def broken():
        raise OSError(28, "No space left on device")

    said = []
    for what in (wrong, broken):
        try:
            from_main(what)
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
        try:
            with main_first():
                what()
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    assert from_main(lambda: os.getpid()) is not None
    said += [from_main(lambda: world.rank), len(set(gather_object([from_main(os.getpid)])))]
    try:
        arguments_refused = "nothing"
        from trl_ama import AMATrainer

        AMATrainer(
            world.spec["model"],
            args=arguments(world, name, accelerator_config={"split_batches": True}),
            train_dataset=pairs(world),
        )
    except AMAError as error:
        arguments_refused = str(error)
    return gather_object([[*said, arguments_refused]])


STREAMED = {
    "data": streams,
    "mixing": "ama_s",
    "mixing_lr": 0.5,
    "streaming_buffer": BUFFER,
    "max_steps": STEPS,
}
CASES = {
    "ama_s": training(mixing="ama_s", mixing_lr=0.5),
    "ama_s-accumulated": training(mixing="ama_s", mixing_lr=0.5, gradient_accumulation_steps=2),
    "ama_r": training(mixing="ama_r", mixing_lr=0.5, excess_clip="none"),
    "ama_r-accumulated": training((1, 2), mixing="ama_r", mixing_lr=0.5, gradient_accumulation_steps=2),
    # Processes with two pairs each, of which one often has none left to run backward
    "ama_s-skipped-accumulated": training(
        (1, 4), mixing="ama_s", mixing_lr=0.5, gradient_accumulation_steps=2, skip_clipped=True
    ),
    "task_normalized": training((1, 2), mixing="task_normalized"),
    "proportional": training(mixing="proportional"),
    "proportional-accumulated": training((1, 2), mixing="proportional", gradient_accumulation_steps=2),
    "dropped": training((1, 2), mixing="ama_s", dataloader_drop_last=True),
    "streamed": training(**STREAMED),
    "specialist": SimpleNamespace(run=specialist, counts=(1, 2)),
    "resumed-ama_s": resumed(mixing="ama_s"),
    # Where a log entry is of steps before and after the checkpoint
    "resumed-proportional": resumed(mixing="proportional", logging_steps=4),
    "resumed-streamed": resumed(**STREAMED),
    "scoring": SimpleNamespace(run=scoring, counts=(1, 2, 4)),
    "errors": SimpleNamespace(run=errors, counts=(2,)),
}
# When all of these are done in one process and in two: they go on from what the other number of processes has saved
LATER = {f"handed_over-{name}": handed_over(f"resumed-{name}") for name in ("ama_s", "proportional", "streamed")}


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), [int(number) for number in sys.argv[2:]] or [1, 2, 4]))
