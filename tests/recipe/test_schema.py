"""A recipe's mistakes are told before torch is imported, in the words of the checks that follow; a schema says the same to editors."""

import argparse
import contextlib
import datetime
import json
import os
import re
import subprocess
import sys

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from places import ROOT
from recipe_mistakes import BASE, GOOD, MISTAKES, argv_of, early, late

from trl_ama import cli
from trl_ama.common.errors import AMAError
from trl_ama.common.value_types import check_hint
from trl_ama.scripts import recipe_check
from trl_ama.scripts.common import check_keys, known_keys, make_parser
from trl_ama.scripts.config_file import read_config
from trl_ama.scripts.recipe_check import PATH, hint_of, is_for_these_versions, read_schema
from trl_ama.scripts.recipe_schema import as_text, make_schema


RECIPES = sorted((ROOT / "recipes").rglob("ama/*.yaml"))
SCHEMA = read_schema()
pytestmark = pytest.mark.usefixtures("here")
current = pytest.mark.skipif(
    not is_for_these_versions(SCHEMA), reason=f"the schema was made from {SCHEMA['x-made-from']}"
)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder for recipes, and what they set in `env` undone."""
    before, folder = dict(os.environ), tmp_path_factory.mktemp("recipes")
    (folder / "there.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    (folder / "pairs").mkdir()
    (folder / "pairs" / "a_train.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    with contextlib.chdir(folder):
        yield folder
    os.environ.clear()
    os.environ.update(before)


@current
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_in_the_same_words(name):
    argv = argv_of(MISTAKES[name])
    said = early(argv)
    assert said is not None and "\n" not in said
    assert said == late(argv)


@pytest.mark.parametrize("command", ["ama-specialists", "ama-losses", "ama-eval", "ama-check"])
def test_every_command_that_reads_a_recipe_tells(command):
    assert early(argv_of(GOOD + "max_train_pairs: 0\n"), command) is not None
    assert early(argv_of(BASE), command).startswith("There are no tasks")
    assert early(argv_of(GOOD), command) is None


@current
def test_commands_have_keys_of_their_own():
    argv = argv_of(GOOD + "show: 5\nsample: few\n")
    assert early(argv, "ama-check") == late(argv, "ama-check") == "argument --sample: invalid int value: 'few'"
    assert early(argv_of(GOOD + "show: 5\n"), "ama-check") is None
    assert "has the key 'show'" in early(argv, "ama-plan")
    assert early(argv_of(GOOD + "device: cpu\njson: x\n"), "ama-plan") is None
    assert early(argv_of(GOOD + "output: x\nadapter: y\n"), "ama-merge") is None
    assert early(argv_of("page: 5\n"), "ama-report") is None  # it has no recipe


# ---- What is left to the checks that follow ----

LEFT = {
    "a recipe": (GOOD, []),
    "no recipe": ("", None),
    "another spelling": (GOOD + "num-processes: 2\nm: true\n", []),
    "keys of accelerate": (GOOD + "num_processes: 2\nmixed_precision: bf16\naccelerate_config: fsdp2\nenv: {A: 1}\n", []),
    "text for numbers": (GOOD + "seed: '1'\nbeta: 1e-1\nmax_length: none\nuse_peft: 'Yes'\nmax_eval_pairs: NULL\n", []),
    "text for lists": (GOOD + "compare: uniform\nonly_tasks: a\nloss_weights: '1'\nloss_type: ipo\n", []),
    "a flag in its place": (GOOD + "learning_rate: fast\nbeta: -1\n", ["--learning_rate", "1e-4", "--beta=0.1"]),
    "flags with dashes": (GOOD + "learning_rate: fast\nlora_r: 0\n", ["--learning-rate=1e-4", "--lora-r", "4"]),
    "flags cut short": (GOOD + "learning_rate: fast\n", ["--learning_ra", "1e-4"]),
    "a flag that turns off": (GOOD + "include_text: maybe\n", ["--no_include_text"]),
    "tasks by flags": (BASE + "tasks: [{task: a}, {task: a}]\n", ["--tasks", "{task: a, path: x}"]),
    "a folder by a flag": (BASE + "tasks: [{task: a, path: json, data_files: no.jsonl}]\n", ["--tasks_dir", "pairs"]),
    "another loss by a flag": (GOOD + "beta: 0\nloss_type: ipo\n", ["--loss_type", "sft"]),
    "mixing by a flag": (GOOD + "mixing: amas\n", ["--mixing", "ama_r"]),
    "tasks of ready losses": (BASE + "reference_losses: org/losses\n", []),
    "ready losses by a flag": (BASE, ["--reference_losses", "org/losses"]),
    "no model": ("output_dir: out\n", []),
    "help": (GOOD + "learning_rate: fast\n", ["--help"]),
    "files that patterns find": (BASE + "tasks: [{task: a, path: json, data_files: 'no*.jsonl'}]\n", []),
    "files elsewhere": (BASE + "tasks: [{task: a, path: json, data_files: 'hf://no.jsonl'}]\n", []),
    "a dataset of the Hub": (BASE + "tasks: [{task: a, path: org/a, data_files: no.jsonl}]\n", []),
    "files that are there": (BASE + "tasks: [{task: a, path: json, data_files: [there.jsonl]}]\n", []),
    "a folder with its files": (BASE + "tasks_dir: pairs\ntasks: [{task: a}]\n", []),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_sure_is_left_to_the_checks_that_follow(name):
    text, flags = LEFT[name]
    assert early([] if flags is None else argv_of(text, *flags)) is None


def test_another_version_may_have_other_keys(monkeypatch):
    monkeypatch.setattr(recipe_check, "installed_versions", lambda: SCHEMA["x-made-from"] | {"trl": "1.99.0"})
    for mistake in (
        "learning_rat: 1\n",
        "num_proceses: 2\n",
        "learning_rate: [1]\n",
        "learning_rate: fast\n",
        "beta: -1\n",
        "lora_r: 0\n",
    ):
        assert early(argv_of(GOOD + mistake)) is None
    # What is ours has no other version
    assert "'smoothing' must be a number" in early(argv_of(GOOD + "smoothing: [1]\n"))
    assert "Two tasks are named 'a'" in early(argv_of(MISTAKES["alike"]))
    assert early(argv_of(MISTAKES["none"])).startswith("There are no tasks")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.parent.name}-{path.stem}")
def test_recipes_pass(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in cli.COMMANDS:
        said = early(["--config", str(path)], command)
        # Its pairs are made by a script first
        assert said is None or "quickstart" in path.parts and "Unable to find" in said
        assert early(["--config", str(path), "--tasks_dir", "somewhere"], command) is None


# ---- All keys ----

VALUES = [
    None, True, 1, -1, 2.5, float("nan"), "abc", "1", "1e-4", "none", "yes", "a  b", [], ["a"], [1.5], {"a": 1}, datetime.date(2025, 7, 8),
]  # fmt: skip


def keys_of_dataclasses():
    return [key for key, entry in SCHEMA["properties"].items() if entry["x-from"] != "accelerate launch"]


@pytest.fixture(scope="module")
def parsers():
    from accelerate.commands.launch import launch_command_parser

    return make_parser("ama", prog="trl ama"), launch_command_parser()


@current
@pytest.mark.parametrize("key", keys_of_dataclasses())
def test_what_is_refused_is_refused_in_the_same_words_by_the_checks_that_follow(parsers, key):
    """Values of any kind for every key, against types and conversions; what passes those, against all that follows."""
    parser, _ = parsers
    action = next(action for action in parser._actions if action.dest == key)
    for value in [*VALUES, *list(action.choices or ())[:2]]:
        recipe = {key: value}
        argv = argv_of(yaml.safe_dump(recipe, allow_unicode=True))
        said = early(argv)
        try:
            check_keys(read_config(argv), *parsers)
            if isinstance(value, str):
                parser._get_value(action, value)
        except (AMAError, argparse.ArgumentError) as error:
            assert said == str(error) or said is None and isinstance(value, str)
            # What is left is the text of a few kinds that others convert
            assert said is not None or "x-text" not in SCHEMA["properties"][key]
            continue
        rest = {name: given for name, given in yaml.safe_load(GOOD).items() if name != key}
        argv = argv_of(yaml.safe_dump(recipe | rest, sort_keys=False))
        said = early(argv)
        if said is not None:
            assert said == late(argv, runs=key in ("tasks", "tasks_dir")), value


@current
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.dictionaries(st.sampled_from(keys_of_dataclasses()), st.sampled_from(VALUES), min_size=2, max_size=4))
def test_several_mistakes_are_refused_too(parsers, recipe):
    """Which of them is said may be another one."""
    text = yaml.safe_dump(yaml.safe_load(GOOD) | recipe, sort_keys=False)
    if early(argv_of(text)) is not None:
        assert late(argv_of(text)) is not None


# ---- The schema ----


@current
def test_the_schema_is_that_of_the_dataclasses(parsers):
    assert as_text(make_schema()) == PATH.read_text(encoding="utf-8"), (
        "run `python -m trl_ama.scripts.recipe_schema --write`"
    )
    known = known_keys(*parsers)
    (pattern,) = SCHEMA["patternProperties"]
    assert all((key in SCHEMA["properties"]) != bool(re.match(pattern, key)) for key in known)
    assert set(SCHEMA["properties"]) <= known
    for key in SCHEMA["properties"]:
        assert SCHEMA["properties"][key].get("description") or key in ("debug", "parallelism_config"), key


def test_types_of_the_schema_are_annotations_again():
    def said(entry, value):
        try:
            check_hint(hint_of(entry), "key", value, "Here,", parses_text=False)
        except AMAError as error:
            return str(error)

    assert said({"type": ["number", "null"]}, None) is said({"type": ["number", "null"]}, 1) is None
    assert said({"type": ["number", "string"]}, []) == "Here, 'key' must be a number or text, got []."
    assert said({"type": "array", "items": {"type": "integer"}}, [1.5]) == "Here, 'key' must be a list, got [1.5]."
    assert said({"enum": ["a"]}, []) is None


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.parent.name}-{path.stem}")
def test_the_schema_is_valid_and_so_are_the_recipes(path):
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    # As editors read it, to which a day is text
    recipe = json.loads(json.dumps(yaml.safe_load(path.read_text(encoding="utf-8")), default=str))
    assert [error.message for error in jsonschema.Draft7Validator(SCHEMA).iter_errors(recipe)] == []


@pytest.mark.parametrize("name", ["unknown", "list for number", "choice", "beta of a loss", "mixing", "compare", "smoothing", "unknown in a task", "no name", "type in a task"])  # fmt: skip
def test_editors_underline_mistakes(name):
    jsonschema = pytest.importorskip("jsonschema")
    valid = jsonschema.Draft7Validator(SCHEMA).is_valid(yaml.safe_load(MISTAKES[name]))
    assert valid == (name == "beta of a loss")  # which hangs on two keys


# ---- As a process ----

RUN = """
import sys
from trl_ama.cli import main
try:
    main(sys.argv[1:])
except SystemExit as error:
    print("code", error.code, *sys.modules)
"""


@current
@pytest.mark.parametrize("name", ["unknown", "word for number", "alike", "none", "no file"])
def test_nothing_heavy_is_imported_for_a_mistake(name):
    argv = argv_of(MISTAKES[name])
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", RUN, "ama", *argv], env=environ, capture_output=True, text=True, timeout=120
    )
    assert result.stderr == f"trl ama: error: {early(argv)}\n"
    _, code, *modules = result.stdout.split()
    assert code == "2"
    assert not {"accelerate", "datasets", "peft", "torch", "transformers", "trl"} & set(modules)
    assert "numpy" not in modules or name in ("alike", "none", "no file")


def test_a_script_that_is_launched_by_hand_tells_too():
    argv = argv_of(MISTAKES["alike"])
    code = "import sys; from trl_ama.scripts.common import run_script; run_script('ama', lambda: sys.exit('parsed'), None)"
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code, *argv], env=environ, capture_output=True, text=True, timeout=120
    )
    assert (result.returncode, result.stderr) == (2, f"trl ama: error: {early(argv)}\n")
