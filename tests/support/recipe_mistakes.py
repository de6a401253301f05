"""Recipes with a mistake, and what is said of them: before torch is imported, and by the checks behind it."""

import contextlib
import importlib
import io
import re
from pathlib import Path

from trl_ama.common.errors import AMAError
from trl_ama.scripts.common import parse_arguments, split_arguments
from trl_ama.scripts.recipe_check import check_early
from trl_ama.tasks.loading import read_tasks


BASE = "model_name_or_path: x\noutput_dir: out\nuse_cpu: true\nbf16: false\n"
TASKS = "tasks:\n  - {task: a, path: org/a}\n  - {task: b, path: org/b}\n"
GOOD = BASE + TASKS

MISTAKES = {
    # Keys
    "unknown": GOOD + "learning_rat: 1.0e-4\n",
    "unknown, of accelerate": GOOD + "num_proceses: 2\n",
    "unknown, like nothing": GOOD + "zzzzzz: 2\n",
    "unknown, after a wrong type": "seed: [1]\n" + GOOD + "smothing: 2\n",
    "streaming": GOOD + "streaming: true\n",
    "of another command": GOOD + "show: 5\n",
    "twice": GOOD + "beta: 0.1\nbeta: 0.2\n",
    "twice in a task": BASE + "tasks:\n  - {task: a, path: x, path: y}\n",
    # Types
    "list for number": GOOD + "learning_rate: [1]\n",
    "mapping for number": GOOD + "lora_r: {a: 1}\n",
    "fraction for whole": GOOD + "seed: 1.5\n",
    "nothing for number": GOOD + "beta:\n",
    "number for text": GOOD + "run_name: 5\n",
    "day for text": GOOD + "run_name: 2025-01-01\n",
    "bool for text": GOOD + "mixed_precision: no\nmixing: true\n",
    "number for bool": GOOD + "drop_empty: 1\n",
    "number for list": GOOD + "only_tasks: 5\n",
    "list with a number": GOOD + "lora_target_modules: [1]\n",
    "text for mapping": GOOD + "liger_kernel_config: [1]\n",
    "number for optimizer": GOOD + "optim: 5\n",
    "word for number": GOOD + "learning_rate: fast\n",
    "words for numbers": GOOD + "seed: much\nper_device_train_batch_size: many\n",
    "word for whole number or none": GOOD + "max_train_pairs: few\n",
    "fraction as text": GOOD + "seed: '1.5'\n",
    "word for bool": GOOD + "use_peft: maybe\n",
    "word for bool or none": GOOD + "tf32: maybe\n",
    "word for one of a list": GOOD + "loss_weights: a\n",
    "choice": GOOD + "excess_clip: pairs\n",
    "choice of transformers": GOOD + "lr_scheduler_type: cosin\n",
    "choice like nothing": GOOD + "sampling: zzzz\n",
    # Strategies
    "mixing": GOOD + "mixing: amas\n",
    "compare": GOOD + "compare: [uniform, unifrm]\n",
    "template_date": GOOD + "template_date: soon\n",
    "losses_config": GOOD + "losses_config: a/b\n",
    "hub_specialist_id": GOOD + "hub_specialist_id: org/all\n",
    "specialist_args": GOOD + "specialist_args: '[1]'\n",
    # Numbers
    "beta": GOOD + "beta: -0.1\n",
    "beta of a loss": GOOD + "beta: 0\nloss_type: ipo\n",
    "beta as text": GOOD + "beta: '-0.1'\n",
    "label_smoothing": GOOD + "loss_type: [sigmoid, robust]\nlabel_smoothing: 0.7\n",
    "a default": GOOD + "loss_type: exo_pair\n",
    "loss_weights": GOOD + "loss_weights: [0.0]\n",
    "learning_rate": GOOD + "learning_rate: .inf\n",
    "learning_rate as text": GOOD + "learning_rate: -1e-4\n",
    "sync_ref_model": GOOD + "sync_ref_model: 'yes'\nref_model_sync_steps: 0\n",
    "num_train_epochs": GOOD + "num_train_epochs: 0\n",
    "seed": GOOD + "seed: 4294967296\n",
    "max_grad_norm": GOOD + "max_grad_norm: .nan\n",
    "smoothing": GOOD + "smoothing: 1.5\n",
    "lora_r": GOOD + "lora_r: 0\n",
    "test_split_size": GOOD + "test_split_size: 1.0\n",
    "max_train_pairs": GOOD + "max_train_pairs: 0\n",
    # Tasks
    "none": BASE,
    "empty": BASE + "tasks: []\n",
    "none, with files": BASE + "tasks_dir: pairs\n",
    "none, with no folder": BASE + "tasks_dir: nowhere\n",
    "alike": BASE + "tasks:\n  - {task: a, path: x}\n  - {task: a, path: y}\n",
    "alike but for case": BASE + "tasks:\n  - {task: A, path: x}\n  - {task: a, path: y}\n",
    "no folder name": BASE + "tasks:\n  - {task: ../a, path: x}\n",
    "mapping": BASE + "tasks: {task: a}\n",
    "text": BASE + "tasks: a\n",
    "entry of text": BASE + "tasks: [a]\n",
    "no name": BASE + "tasks:\n  - {path: x}\n",
    "unknown in a task": BASE + "tasks:\n  - {task: a, path: x, eval_spilt: test}\n",
    "fraction": BASE + "tasks:\n  - {task: a, path: x, fraction: 0.5}\n",
    "type in a task": BASE + "tasks:\n  - {task: a, path: 5}\n",
    "text for number in a task": BASE + "tasks:\n  - {task: a, path: x, specialist_args: 5}\n",
    "columns": BASE + "tasks:\n  - {task: a, path: x, columns: {prompt: 5}}\n",
    # Files
    "no file": BASE + "tasks:\n  - {task: a, path: json, data_files: no.jsonl}\n",
    "one of two": BASE + "tasks:\n  - {task: a, path: json, data_files: [there.jsonl, no.jsonl]}\n",
    "of a split": BASE + "tasks:\n  - {task: a, path: json, data_files: {train: there.jsonl, test: no.jsonl}}\n",
    "in a folder": BASE + "tasks:\n  - {task: a, path: csv, data_dir: pairs, data_files: no.csv}\n",
    "of another split": BASE + "tasks:\n  - {task: a, path: parquet, data_files: /no/where.parquet, split: all}\n",
    "the path is a file": BASE + "tasks:\n  - {task: a, path: there.jsonl}\n",
    "tasks_dir without the task": BASE + "tasks_dir: pairs\ntasks:\n  - {task: b}\n",
    "no tasks_dir": BASE + "tasks_dir: nowhere\ntasks:\n  - {task: b}\n",
}  # fmt: skip


def argv_of(text: str, *flags: str) -> list[str]:
    """Write a recipe into the current folder, and return the flags that name it."""
    Path("recipe.yaml").write_text(text, encoding="utf-8")
    return ["--config", "recipe.yaml", *flags]


def early(argv: list[str], command: str = "ama") -> str | None:
    """What is said before torch is imported; `None` if that is nothing."""
    try:
        check_early(command, argv)
    except AMAError as error:
        return str(error)
    return None


def late(argv: list[str], command: str = "ama", runs: bool = True) -> str | None:
    """What the command says without the early check: where it parses, and, if it runs, where it reads the pairs."""
    script = importlib.import_module(f"trl_ama.scripts.{command.replace('-', '_')}")
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            _, script_args = split_arguments(script.make_parser(prog="trl ama"), argv)
            if runs:
                *_, task_args = parse_arguments(script.make_parser(prog="trl ama"), script_args)
                read_tasks(task_args)
        except AMAError as error:
            return str(error)
        except SystemExit:
            return re.fullmatch(r"trl ama: error: (.*)", errors.getvalue().splitlines()[-1])[1]
    return None
