"""The names of a run's files and folders: as earlier versions wrote them, and spelt in one module."""

import ast
from pathlib import Path

from places import PACKAGE

from trl_ama.common import run_folder as run_names
from trl_ama.common.run_folder import RunFolder, rows_file, task_lock


HOME = Path(run_names.__file__)
FILES = {
    "stage.json", "trainer_state.json", "fingerprint.json", "run.json", "results.json", "results.md", "index.html",
    "held_out_margins.parquet", "mixture.png", "train.parquet", "test.parquet", ".locks", ".shards", "run.lock",
}  # fmt: skip
FOLDERS = {"specialists", "reference_losses", "generalists", "report", "plots"}  # words that stand for much else, too


def test_they_are_what_they_were():
    run = RunFolder("out")
    places = {
        run.specialist("code"): "specialists/code",
        run.losses_of("code"): "reference_losses/code",
        run.shards("code"): "reference_losses/.code.shards",
        run.generalist("ama_s"): "generalists/ama_s",
        run.results: "results.json",
        run.result_table: "results.md",
        run.margins: "held_out_margins.parquet",
        run.plot: "plots/mixture.png",
        run.page: "report/index.html",
        run.note: "report/run.json",
        run.lock(run_names.RUN_LOCK): ".locks/run.lock",
        run.lock_note(task_lock("code")): ".locks/task-code.json",
    }
    assert {str(path.relative_to("out")) for path in places} == set(places.values())
    assert [path.relative_to("out").as_posix() for path in places] == list(places.values())
    assert rows_file("train") == "train.parquet"
    assert (run_names.STAGE_FILE, run_names.STATE_FILE) == ("stage.json", "trainer_state.json")
    assert (run_names.FINGERPRINT_FILE, run_names.SHARDS_FILE) == ("fingerprint.json", "run.json")


def test_shards_and_locks_are_found_again(tmp_path):
    run = RunFolder(tmp_path)
    assert run.tasks_with_shards() == [] and run.task_locks() == []
    for task in ("a.b", "code"):
        run.shards(task).mkdir(parents=True)
        run.losses_of(task).mkdir()
    run.locks.mkdir()
    for name in (run_names.RUN_LOCK, task_lock("code"), task_lock("a.b")):
        run.lock(name).touch()
        run.lock_note(name).touch()
    assert sorted(run.tasks_with_shards()) == ["a.b", "code"]
    assert run.task_locks() == [run.lock(task_lock("a.b")), run.lock(task_lock("code"))]


def spelt_in(path: Path) -> set[str]:
    """The names of a run's files and folders in a module's code, but not in its docstrings and sentences."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    texts = {node: node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and type(node.value) is str}
    joined = {
        side for node in ast.walk(tree) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)
        for side in ast.walk(node)
    }  # fmt: skip
    found = set()
    for node, text in texts.items():
        parts = text.split("/")
        found |= FILES & set(parts)
        if node in joined or (len(parts) > 1 and " " not in text):
            found |= FOLDERS & set(parts)
    return found


def test_no_other_module_spells_them():
    assert {*FOLDERS, "stage.json", "results.json"} <= spelt_in(HOME)
    assert {
        str(path.relative_to(PACKAGE)): spelt_in(path)
        for path in PACKAGE.rglob("*.py")
        if path != HOME and spelt_in(path)
    } == {}
