"""A key that is twice in one mapping of a recipe is an error with both lines; PyYAML keeps the last and says nothing."""

import pytest

from trl_ama import AMAError, TaskConfig, TaskMixtureConfig
from trl_ama.common.yaml_files import load_yaml
from trl_ama.recipe.arguments import PipelineArguments
from trl_ama.scripts.common import make_parser, parse_arguments, read_config, split_arguments


RECIPE = "model_name_or_path: x\nuse_cpu: true\nbf16: false\noutput_dir: out\n"
TASKS = "tasks:\n  - {task: a, path: x}\n  - {task: b, path: x}\n"


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        (RECIPE + "beta: 0.1\nlearning_rate: 1.0e-4\nbeta: 0.2\n", "beta", "lines 5 and 7"),
        (RECIPE + TASKS + "tasks:\n  - {task: c, path: y}\n", "tasks", "lines 5 and 8"),
        (RECIPE + "specialist_args:\n  max_steps: 5\nlogging_steps: 1\nspecialist_args:\n  beta: 0.2\n", "specialist_args", "lines 5 and 8"),
        (RECIPE + "specialist_args:\n  max_steps: 5\n  max_steps: 6\n", "max_steps", "lines 6 and 7"),
        (RECIPE + "tasks:\n  - {task: a, specialist: x/a, specialist: x/b}\n", "specialist", "line 6"),
        (RECIPE + "tasks:\n  - task: a\n    chat_template_kwargs:\n      day: 1\n      'day': 2\n", "day", "lines 8 and 9"),
        (RECIPE + "env: {A: 1, B: 2, A: 3}\n", "A", "line 5"),
    ],
)  # fmt: skip
def test_a_key_that_is_there_twice_is_named_with_its_lines(tmp_path, text, key, lines):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    expected = f"recipe.yaml has the key '{key}' twice in one mapping .{lines}., and only the last would count"
    with pytest.raises(AMAError, match=expected):
        read_config(["--config", str(path)])
    for parse in (split_arguments, parse_arguments):  # the command, and a script that is launched without it
        with pytest.raises(AMAError, match=expected):
            parse(make_parser("ama", prog="trl ama"), ["--config", str(path)])


def test_in_what_the_command_line_gives():
    with pytest.raises(AMAError, match="has the key 'path' twice in one mapping .line 1."):
        TaskMixtureConfig(tasks=["{task: a, path: x, path: y}"])
    with pytest.raises(AMAError, match="The task .* has the key 'beta' twice"):
        TaskConfig.from_entry("{task: a, specialist_args: {beta: 1, beta: 2}}")
    with pytest.raises(AMAError, match="specialist_args has the key 'beta' twice"):
        PipelineArguments(specialist_args="{beta: 1, beta: 2}")


def test_in_a_config_of_accelerate(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE + TASKS)
    (tmp_path / "ddp.yaml").write_text("num_processes: 2\nmixed_precision: 'no'\nnum_processes: 4\n")
    argv = ["--config", str(tmp_path / "recipe.yaml")]
    for flag in (["--accelerate_config", str(tmp_path / "ddp.yaml")], [f"--config_file={tmp_path / 'ddp.yaml'}"]):
        with pytest.raises(
            AMAError, match="ddp.yaml has the key 'num_processes' twice in one mapping .lines 1 and 3."
        ):
            split_arguments(make_parser("ama", prog="trl ama"), [*argv, *flag])


def test_what_is_no_duplicate():
    text = """
defaults: &defaults {beta: 0.1, seed: 1}
specialist_args: {<<: *defaults, beta: 0.2}
tasks: [{task: a, path: x}, {task: b, path: x}]
again: *defaults
1: one
"1": text
"""
    values = load_yaml(text, "it")
    assert values["specialist_args"] == {"beta": 0.2, "seed": 1} and values[1] == "one" and values["1"] == "text"
    loop = load_yaml("&a [*a, {x: 1}]", "it")
    assert loop[0] is loop
    assert load_yaml("", "it") is None and load_yaml("5", "it") == 5
