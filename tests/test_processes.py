"""Several processes give the numbers of one: real ones, on the CPU, over gloo. The cases are in `processes_worker.py`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import QUICK, make_dataset
from processes_worker import BATCH, CASES
from test_invariants import with_reference_columns


ROOT = Path(__file__).parent.parent
SIZES = {"list": 21, "sort": 9, "brief": 13}  # 43 pairs: an epoch of batches of 8 ends with 3
COUNTS = (1, 2, 4)


@pytest.fixture(scope="module")
def world(model_dir, tmp_path_factory):
    """The worker's folder after it has run, and its results by number of processes."""
    folder = tmp_path_factory.mktemp("processes")
    with_reference_columns(make_dataset(SIZES)).save_to_disk(str(folder / "pairs"))
    quick = {**QUICK, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "logging_steps": 1, "seed": 7}
    (folder / "spec.json").write_text(json.dumps({"model": model_dir, "quick": quick}))
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, ROOT / "tests" / "processes_worker.py", folder, *map(str, COUNTS)],
        env=environ,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return folder, {count: json.loads((folder / f"{count}.json").read_text()) for count in COUNTS}


def several(names):
    """Of each case, the numbers of processes that it runs in beside one."""
    return [(name, count) for name in names for count in CASES[name].counts if count > 1]


def logged(result, key):
    return [entry[key] for entry in result["log"] if key in entry]


def weights(folder, count, name):
    return np.load(folder / f"{count}-{name}.npz")


TRAININGS = [
    name for name in CASES if name.split("-")[0] in ("ama_s", "ama_r", "task_normalized", "proportional", "dropped")
]


@pytest.mark.parametrize(("name", "count"), several(TRAININGS))
def test_training_is_that_of_one_process(world, name, count):
    """Same draws exactly, same α to 1e-6, same losses; with accumulation, and with an epoch whose end is uneven."""
    folder, results = world
    one, ours = results[1][name], results[count][name]
    steps = len(one["drawn"])
    accumulation = 2 if name.endswith("accumulated") else 1
    sizes = [BATCH * accumulation] * (sum(SIZES.values()) // (BATCH * accumulation))
    if name != "dropped":
        sizes.append(sum(SIZES.values()) - sum(sizes))
    assert [len(drawn) for drawn in one["drawn"]] == sizes * 2
    assert ours["drawn"] == one["drawn"]
    for task in SIZES:
        for figure in ("probability", "weight", "excess", "loss", "clipped_fraction"):
            key = f"ama/{figure}/{task}"
            tolerance = 1e-6 if figure in ("probability", "weight") else 2e-5
            np.testing.assert_allclose(logged(ours, key), logged(one, key), atol=tolerance, rtol=0, err_msg=key)
    assert len(logged(ours, "loss")) == steps
    np.testing.assert_allclose(logged(ours, "loss"), logged(one, "loss"), atol=2e-5)
    np.testing.assert_allclose(logged(ours, "grad_norm"), logged(one, "grad_norm"), rtol=1e-3)
    if name.startswith("ama"):
        moved = np.array(
            [logged(one, f"ama/{'probability' if 'ama_s' in name else 'weight'}/{task}") for task in SIZES]
        )
        assert np.abs(moved[:, -1] - moved[:, 0]).max() > 0.02  # there was something to agree on
    expected = weights(folder, 1, name)
    for key, value in weights(folder, count, name).items():
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


@pytest.mark.parametrize("mixing", ["ama_s", "proportional"])
def test_resuming_in_the_second_epoch(world, mixing):
    """Two processes, the same bits, the uneven end of the epoch and the pairs repeated there included."""
    folder, results = world
    whole, rest = results[2][f"resumed-{mixing}"]
    assert len(whole["drawn"]) == 12 and rest["drawn"] == whole["drawn"][8:]
    for key in ("loss", "grad_norm", "ama/excess/list"):
        assert logged(rest, key) == logged(whole, key)
    ends = [weights(folder, 2, f"resumed-{mixing}-{number}") for number in (0, 1)]
    for key, value in ends[0].items():
        np.testing.assert_array_equal(value, ends[1][key], err_msg=key)


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


def test_an_error_of_the_main_process_is_everybodys(world):
    main, other = world[1][2]["errors"]
    sentence = "AMAError: The folder 'x' is not there. Make it."
    assert main[:2] == other[:2] == [sentence, sentence]
    assert main[2:4] == ["OSError: [Errno 28] No space left on device"] * 2
    assert other[2:4] == ["AMAError: The main process stopped with OSError: [Errno 28] No space left on device"] * 2
    assert main[4:6] == other[4:6] == [0, 1]
    for said in (main, other):
        assert "accelerator_config sets split_batches=True" in said[6] and "2 processes" in said[6]
