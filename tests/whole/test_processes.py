"""Several processes give the numbers of one: real ones, on the CPU, over gloo. The cases are in `processes_worker.py`."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from places import ROOT, SUPPORT
from processes_worker import BATCH, CASES, LATER, SAVED_AT, STEPS, copy_specialist
from tiny_pairs import make_dataset, make_rows, with_reference_columns
from tiny_runs import QUICK

from trl_ama import AMAError
from trl_ama.common.fingerprint import check_fingerprint
from trl_ama.recipe.fingerprint import relevant_arguments
from trl_ama.reference_losses.shards import LossShards
from trl_ama.training.checkpoints import damage_of, read_manifest


pytestmark = pytest.mark.slow


SIZES = {"list": 13, "sort": 6, "brief": 8}  # 27 pairs: an epoch of batches of 8 ends with 3
TASKS = ["list", "sort"]  # of the pipeline
COUNTS = (1, 2, 4)
EPOCHS, STEPS_OF_GENERALIST = 5, 25  # of 38 pairs in batches of 8: long enough to be found while it trains
# Flags of the command in two processes
TWO = [*("--per_device_train_batch_size", str(BATCH // 2)), *("--save_strategy", "steps")]


@pytest.fixture(scope="module")
def world(model_dir, tmp_path_factory):
    """The worker's folder after it has run, and its results by number of processes."""
    folder = tmp_path_factory.mktemp("processes")
    with_reference_columns(make_dataset(SIZES)).save_to_disk(str(folder / "pairs"))
    quick = {**QUICK, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "logging_steps": 1, "seed": 7}
    for task in TASKS:
        for split, size, seed in (("train", 19, 0), ("test", 7, 1)):
            with open(folder / f"{task}_{split}.jsonl", "w") as file:
                file.writelines(json.dumps(row) + "\n" for row in make_rows(task, size, seed))
    recipe = {
        **quick,
        "model_name_or_path": model_dir,
        "tasks": [{"task": task} for task in TASKS],
        "tasks_dir": str(folder),
        "use_peft": True,
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_modules": "all-linear",
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": 2,
        "num_train_epochs": EPOCHS,
        "specialist_args": {"num_train_epochs": 1},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    spec = {"model": model_dir, "quick": quick, "recipe": str(folder / "recipe.yaml"), "jobs": TASKS, "two": TWO}
    (folder / "spec.json").write_text(json.dumps(spec))
    run = python(SUPPORT / "processes_worker.py", folder, *COUNTS)
    assert run.returncode == 0, run.stdout + run.stderr
    return folder, {count: json.loads((folder / f"{count}.json").read_text()) for count in COUNTS}


def read(path):
    """What another process has written so far, which may end within a character."""
    return path.read_text(encoding="utf-8", errors="replace")


def environ():
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(SUPPORT)]), "OMP_NUM_THREADS": "1"}


def python(*arguments):
    return subprocess.run([sys.executable, *map(str, arguments)], env=environ(), capture_output=True, text=True)


def several(names):
    """Of each case, the numbers of processes that it runs in beside one."""
    return [(name, count) for name in names for count in CASES[name].counts if count > 1]


def logged(result, key):
    return [entry[key] for entry in result["log"] if key in entry]


def weights(folder, count, name):
    return np.load(folder / f"{count}-{name}.npz")


TRAININGS = [
    name
    for name in CASES
    if name.split("-")[0] in ("ama_s", "ama_r", "task_normalized", "proportional", "dropped", "streamed")
]


@pytest.mark.parametrize(("name", "count"), several(TRAININGS))
def test_training_is_that_of_one_process(world, name, count):
    """Same draws exactly, same α to 1e-6, same losses; with accumulation, with an epoch whose end is uneven, and of streams."""
    folder, results = world
    one, ours = results[1][name], results[count][name]
    steps = len(one["drawn"])
    accumulation = 2 if name.endswith("accumulated") else 1
    sizes = [BATCH * accumulation] * (sum(SIZES.values()) // (BATCH * accumulation))
    if name != "dropped":
        sizes.append(sum(SIZES.values()) - sum(sizes))
    assert [len(drawn) for drawn in one["drawn"]] == ([BATCH] * STEPS if name == "streamed" else sizes * 2)
    assert ours["drawn"] == one["drawn"]
    check_figures(ours, one)
    assert len(logged(ours, "loss")) == steps
    if name.startswith(("ama", "streamed")):
        figure = "weight" if name.startswith("ama_r") else "probability"
        moved = np.array([logged(one, f"ama/{figure}/{task}") for task in SIZES])
        assert np.abs(moved[:, -1] - moved[:, 0]).max() > 0.02  # there was something to agree on
    check_weights(folder, (count, name), (1, name))


def test_clipped_pairs_that_do_not_run_backward(world):
    """Every process takes part in the sum of the gradients, also one that has no other pair."""
    folder, results = world
    whole, name = results[1]["ama_s-accumulated"], "ama_s-skipped-accumulated"
    for count, least in ((1, 20), (4, 8)):  # several begin with two steps as a whole
        assert results[count][name]["skipped"] > least and whole["skipped"] == 0
        check_figures(results[count][name], whole)
        check_weights(folder, (count, name), (1, "ama_s-accumulated"))


def check_figures(ours, one):
    """What was logged, against that of one process."""
    for task in SIZES:
        for figure in ("probability", "weight", "excess", "loss", "clipped_fraction"):
            key = f"ama/{figure}/{task}"
            tolerance = 1e-6 if figure in ("probability", "weight") else 2e-5
            np.testing.assert_allclose(logged(ours, key), logged(one, key), atol=tolerance, rtol=0, err_msg=key)
    np.testing.assert_allclose(logged(ours, "loss"), logged(one, "loss"), atol=2e-5)
    np.testing.assert_allclose(logged(ours, "grad_norm"), logged(one, "grad_norm"), rtol=1e-3)


def check_weights(folder, ours, one):
    expected = weights(folder, *one)
    for key, value in weights(folder, *ours).items():
        np.testing.assert_allclose(value, expected[key], atol=5e-5, err_msg=key)


def test_specialist_and_its_reference(world):
    """TRL's precompute stops with an error on data in memory; here both kinds of data give what one process gives."""
    folder, results = world
    for place in ("memory", "disk"):
        one, two = results[1]["specialist"][place], results[2]["specialist"][place]
        np.testing.assert_allclose(two["reference"], one["reference"], atol=1e-4)
        np.testing.assert_allclose(logged(two, "loss"), logged(one, "loss"), atol=2e-5)
        expected = weights(folder, 1, f"specialist-{place}")
        for key, value in weights(folder, 2, f"specialist-{place}").items():
            np.testing.assert_allclose(value, expected[key], atol=5e-5, err_msg=key)


@pytest.mark.parametrize("name", ["ama_s", "proportional", "streamed"])
def test_resuming_in_the_second_epoch(world, name):
    """Two processes, the same bits, the uneven end of the epoch and the pairs repeated there included; and those of streams."""
    folder, results = world
    whole, rest = results[2][f"resumed-{name}"]
    assert len(whole["drawn"]) == STEPS and rest["drawn"] == whole["drawn"][SAVED_AT:]
    entries = STEPS // CASES[f"resumed-{name}"].settings.get("logging_steps", 1)
    for key in ("loss", "grad_norm", "ama/excess/list"):
        assert len(logged(whole, key)) == entries and logged(rest, key) == logged(whole, key)
    assert logged(rest, "train_loss") == logged(whole, "train_loss")
    ends = [weights(folder, 2, f"resumed-{name}-{number}") for number in (0, 1)]
    for key, value in ends[0].items():
        np.testing.assert_array_equal(value, ends[1][key], err_msg=key)


@pytest.mark.parametrize("name", [name.removeprefix("handed_over-") for name in LATER])
@pytest.mark.parametrize("count", [1, 2])
def test_a_checkpoint_is_resumed_by_another_number_of_processes(world, name, count):
    """What one process has saved goes on in two, and the other way round, with the draws of one undisturbed process."""
    folder, results = world
    whole, rest = results[1][f"resumed-{name}"][0], results[count][f"handed_over-{name}"]
    assert len(whole["drawn"]) == STEPS and rest["drawn"] == whole["drawn"][SAVED_AT:]
    check_figures(rest, whole)
    np.testing.assert_allclose(logged(rest, "train_loss"), logged(whole, "train_loss"), atol=2e-5)
    check_weights(folder, (count, f"handed_over-{name}"), (1, f"resumed-{name}-0"))


@pytest.mark.parametrize("name", [name.removeprefix("handed_over-") for name in LATER])
@pytest.mark.parametrize("count", [1, 2])
def test_another_number_of_pairs_in_a_step(world, name, count):
    """As where the number of processes changes and nothing else; every process says it. `proportional` goes on, as in TRL."""
    ours = BATCH // 2 if count == 1 else BATCH * 2
    said = world[1][count][f"handed_over-{name}"]["refused"]
    assert len(said) == count and len({*said}) == 1
    if name == "proportional":
        assert said[0] == "nothing"
    else:
        assert f"written with pairs per optimizer step {BATCH}, this run has {ours}, so its draws cannot" in said[0]


@pytest.mark.parametrize("path", ["auto", "False"])
def test_scores_do_not_depend_on_the_number_of_processes(world, path):
    folder = world[0]
    one = np.load(folder / f"1-scoring-{path}.npz")
    assert len(one["chosen_logps"]) == sum(SIZES.values()) and (one["chosen_logps"] < 0).all()
    for count in (2, 4):
        ours = np.load(folder / f"{count}-scoring-{path}.npz")
        assert {key: values.dtype for key, values in ours.items()} == {
            key: values.dtype for key, values in one.items()
        }
        for key, values in one.items():
            np.testing.assert_array_equal(ours[key], values)


def test_batches_are_shared_out(world):
    results = {count: result["scoring"] for count, result in world[1].items()}
    (whole,) = results[1][0]["batches"]
    assert len(whole) > 8
    for count in (2, 4):
        first, second = results[count]
        # In turn, in the order of one process; and what a lost file held is shared out again
        assert first["batches"] == [whole[rank::count] for rank in range(count)]
        assert first["files"] == [f"{rank:03d}-00000" for rank in range(count)]
        lost = whole[0::count]
        assert second["batches"] == [lost[rank::count] for rank in range(count)]
        assert len(second["files"]) == 2 * count - 1


def test_shards_of_several_processes_are_read_by_one(world):
    folder = world[0]
    one = np.load(folder / "1-scoring-False.npz")
    scores = {key: np.zeros_like(values) for key, values in one.items()}
    ids = [str(row) for row in range(sum(SIZES.values()))]
    assert LossShards(folder / "4-shards", {"run": 1}, ids).load(scores).all()
    for key, values in one.items():
        np.testing.assert_array_equal(scores[key], values)


def test_an_error_of_the_main_process_is_everybodys(world):
    main, other = world[1][2]["errors"]
    sentence = "AMAError: The folder 'x' is not there. Make it."
    assert main[:2] == other[:2] == [sentence, sentence]
    assert main[2:4] == ["OSError: [Errno 28] No space left on device"] * 2
    assert other[2:4] == ["AMAError: The main process stopped with OSError: [Errno 28] No space left on device"] * 2
    assert main[4:6] == other[4:6] == [0, 1]
    for said in (main, other):
        assert "accelerator_config sets split_batches=True" in said[6] and "2 processes" in said[6]


# ---- The commands ----


def adapter(folder, *names):
    from safetensors.numpy import load_file

    return load_file(folder.joinpath(*names, "adapter_model.safetensors"))


def losses(folder, task, split="train"):
    table = pq.read_table(folder / "reference_losses" / task / f"{split}.parquet")
    return {name: table[name].to_numpy() for name in table.column_names if "logps" in name or "tokens" in name}


def test_jobs_side_by_side_make_what_one_run_makes(world):
    """`--only_tasks`, one job for each task and all at once, then a job that finds their work done."""
    folder = world[0]
    for task in TASKS:
        ours, theirs = (adapter(folder / run, "specialists", task) for run in ("jobs", "alone"))
        assert all(np.array_equal(ours[name], value) for name, value in theirs.items())
        ours, theirs = (losses(folder / run, task) for run in ("jobs", "alone"))
        assert all(np.array_equal(ours[name], value) for name, value in theirs.items())
    ours, theirs = (adapter(folder / run, "generalists", "ama_s") for run in ("jobs", "alone"))
    assert all(np.array_equal(ours[name], value) for name, value in theirs.items())
    said = (folder / "said.txt").read_text()
    assert said.count(" done\n") == 2 * len(TASKS) and "specialist of task" not in said.lower()
    results = [json.loads((folder / run / "results.json").read_text()) for run in ("jobs", "alone")]
    assert results[0]["policies"] == results[1]["policies"]


@pytest.fixture(scope="module")
def interrupted(world, tmp_path_factory):
    """`trl ama --num_processes 2`, which SIGTERM stops while the generalist trains; then the same command again.

    It goes on from a run of one process, and has a specialist, all losses, the generalists and the results to make.
    """
    tmp_path = tmp_path_factory.mktemp("interrupted")
    run, paths = tmp_path / "run", [tmp_path / "output.txt", tmp_path / "errors.txt"]
    copy_specialist(world[0] / "alone", run, TASKS[0])
    command = [
        *("-m", "trl_ama", "ama", "--config", world[0] / "recipe.yaml", "--output_dir", run, *TWO),
        *("--accelerate_config", ROOT / "recipes" / "accelerate_configs" / "ddp.yaml", "--num_processes", 2),
        *("--mixed_precision", "no", "--compare", "proportional"),
        *("--main_process_port", "0"),  # any that is free: others may run on this machine
        *("--disable_tqdm", "false"),  # the progress bar tells how far the training is
    ]
    with open(paths[0], "w") as output, open(paths[1], "w") as errors:
        process = subprocess.Popen([sys.executable, *map(str, command)], env=environ(), stdout=output, stderr=errors)
    try:
        end = time.monotonic() + 300  # a machine that does much else
        while not re.search(rf"\b[1-9]\d*/{STEPS_OF_GENERALIST} \[", read(paths[1])):
            assert process.poll() is None and time.monotonic() < end, read(paths[1])
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=180)
    finally:
        process.kill()
    checkpoints = {
        path: None if damage_of(path) is not None else read_manifest(path) for path in run.glob("*/*/checkpoint-*")
    }
    return SimpleNamespace(
        folder=run,
        code=code,
        output=read(paths[0]),
        errors=read(paths[1]),
        checkpoints={path: note for path, note in checkpoints.items() if "generalists" in path.parts},
        again=python(*command),
    )


def test_sigterm_to_the_command_makes_all_processes_save_once(interrupted):
    assert interrupted.code == 75 and "Traceback" not in interrupted.errors, interrupted.errors
    ((checkpoint, note),) = interrupted.checkpoints.items()
    step = int(checkpoint.name.split("-")[1])
    assert checkpoint.parent.name == "ama_s" and 0 < step < STEPS_OF_GENERALIST
    assert note["complete"] and {"rng_state_0.pth", "rng_state_1.pth"} <= {*note["files"]}
    assert interrupted.errors.count("Interrupted by SIGTERM") == 1
    assert f"Interrupted by SIGTERM: saved at step {step} of the generalist" in interrupted.errors


def test_the_interrupted_command_run_again_ends_as_if_nothing_had_been(world, interrupted):
    """In two processes, with the bits of two processes that nobody disturbed."""
    assert interrupted.again.returncode == 0, interrupted.again.stdout + interrupted.again.stderr
    (checkpoint,) = interrupted.checkpoints
    assert f"resuming from {checkpoint}\n" in interrupted.again.stdout
    folders = interrupted.folder, world[0] / "two"
    for names in (*(("specialists", task) for task in TASKS), ("generalists", "ama_s")):
        ours, theirs = (adapter(path, *names) for path in folders)
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            np.testing.assert_array_equal(ours[name], value, err_msg=f"{names}: {name}")
    ours, theirs = (json.loads((path / "results.json").read_text())["policies"] for path in folders)
    assert all(ours[name] == policy for name, policy in theirs.items())


def test_the_command_in_two_processes(world, interrupted):
    """What it made beside the specialist of a run of one process is what one process makes."""
    folder, run = world[0], interrupted.folder
    assert interrupted.again.returncode == 0, interrupted.again.stdout + interrupted.again.stderr
    lines = [line.split() for line in interrupted.output.splitlines()]
    assert lines.count(["specialist", "list", "done"]) == 1 and lines.count(["specialist", "sort", "to", "do"]) == 1
    for split in ("train", "test"):
        ours, theirs = (losses(path, "list", split) for path in (run, folder / "alone"))
        assert all(np.array_equal(ours[name], value) for name, value in theirs.items())
        ours, theirs = (losses(path, "sort", split) for path in (run, folder / "alone"))
        assert np.array_equal(ours["ref_chosen_logps"], theirs["ref_chosen_logps"])
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name], value, atol=1e-3, err_msg=name)
    for names in (("specialists", "sort"), ("generalists", "ama_s"), ("generalists", "proportional")):
        ours, theirs = (adapter(path, *names) for path in (run, folder / "alone"))
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name], value, atol=1e-4, err_msg=f"{names}: {name}")
    ours, theirs = (json.loads((path / "results.json").read_text()) for path in (run, folder / "alone"))
    for name, policy in theirs["policies"].items():
        for task, figures in policy["by_task"].items():
            for figure in ("loss", "margin", "pairs"):
                assert ours["policies"][name]["by_task"][task][figure] == pytest.approx(figures[figure], abs=1e-3)
    assert (run / "report" / "index.html").is_file()


FAILS = """
import sys, time
from accelerate import PartialState
from trl_ama.common.errors import AMAError
from trl_ama.scripts.common import report_errors
state = PartialState(cpu=True)
with report_errors("ama"):
    if state.process_index == int(sys.argv[1]):
        raise AMAError("The disk of this process is full.")
    state.wait_for_everyone()
"""


def test_an_error_of_any_process_ends_the_run(tmp_path):
    (tmp_path / "fails.py").write_text(FAILS)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, tmp_path / "fails.py")
    run = python(*launch, 1)
    assert run.returncode != 0
    assert run.stderr.count("trl ama: error: The disk of this process is full.") == 1


def test_a_fingerprint_has_the_pairs_of_a_step_and_not_their_split(quick_args):
    def noted(batch, accumulation):
        args = quick_args(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
        return relevant_arguments(args)

    assert noted(8, 1) == noted(2, 4) and noted(8, 1)["pairs_per_step"] == 8
    with pytest.raises(AMAError, match="made with pairs_per_step=16, but this run has pairs_per_step=8"):
        check_fingerprint(noted(8, 1), noted(4, 4), "It was", "Mend it.")
    old = {key: value for key, value in noted(8, 1).items() if key != "pairs_per_step"}  # of trl-ama 0.1
    check_fingerprint(noted(8, 1), {**old, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, "", "")
    with pytest.raises(AMAError, match="made with pairs_per_step=12, but this run has pairs_per_step=8"):
        other = {**old, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
        check_fingerprint(noted(8, 1), other, "It was", "Mend it.")
