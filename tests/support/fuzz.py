"""Malformed recipes, files of pairs, datasets and loss folders by the thousand: none may end in a traceback or a hang.

```bash
python tests/support/fuzz.py --cases 2500            # the whole
python tests/support/fuzz.py --cases 1 --start 1234  # one again, with its input and its traceback
```

A case is made from its number alone. It runs in one child process with all others, through the functions that `trl ama` calls before anything is
trained, and ends in one of: `success`, `AMAError` (one sentence, exit code 2), `argparse` (exit code 2); or, which fails the
fuzz, `traceback`, `hang`, `crash` or `long` (a message that nobody reads). tests/whole/test_fuzz.py runs some hundred of them.
"""

import argparse
import contextlib
import copy
import gzip
import io
import json
import os
import random
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import surroundings  # noqa: F401 - before the libraries that read the environment
import yaml
from kept import keep_and_freeze
from tiny_models import make_model, make_tokenizer, save
from tiny_pairs import make_rows
from tiny_runs import QUICK


TASKS = ("list", "sort")
SECONDS = 20  # of a case; the slowest take about one
LONGEST = 3000  # characters of a message
FAILURES = ("traceback", "hang", "crash", "long")
KINDS = {"recipe": 11, "rows": 6, "trainer": 4, "losses": 4, "streams": 3}  # and how often


class Outcome(NamedTuple):
    """How a case ended, and what it said."""

    name: str
    text: str


class _HangError(BaseException):
    """Not an `Exception`, so that nothing takes it for an error of its own."""


@contextlib.contextmanager
def watched(seconds: int):
    """Raise `_HangError` in this thread when the time is over."""

    def ring(*_):
        raise _HangError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# ---- Junk ----

_PLAIN = (
    None, True, False, 0, 1, -1, 2, 10**6, -(10**9), 10**18, 10**30, 0.5, -0.5, 1e-320, 1e308, float("nan"), float("inf"),
    "", " ", "abc", "1e-4", "0", "-1", "true", "none", "nan", "../..", "/nowhere/at/all", "~", ".", "*", "[", "a" * 300, "a b", "💥", "ü/ß",
    "\x00", "a\x00b", "\ud800", "line\nbreak", "{x}", "{task}", "%s", "'", '"', "org/none", "org/none@main", "@", "-", "--flag", "auto", "pair",
)  # fmt: skip


def junk(rng: random.Random, depth: int = 0) -> Any:
    """A value that no field wants."""
    kind = rng.random()
    if kind < 0.72 or depth > 3:
        return rng.choice(_PLAIN)
    if kind < 0.86:
        return [junk(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    keys = ("a", "", "task", "path", "role", "content", 5, None, True, "\ud800")
    return {rng.choice(keys): junk(rng, depth + 1) for _ in range(rng.randint(0, 3))}


def leaves(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths of everything within nested dicts and lists."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += leaves(inner, (*path, key))
    return found


def change(rng: random.Random, value: Any, replacement=junk) -> None:
    """Replace, wrap, drop or add something within nested dicts and lists, in place."""
    paths = leaves(value)
    if not paths:
        return
    path = rng.choice(paths)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    kind = rng.random()
    if kind < 0.55:
        inner[path[-1]] = replacement(rng)
    elif kind < 0.65:
        inner[path[-1]] = rng.choice(([inner[path[-1]]], {"a": inner[path[-1]]}, [inner[path[-1]]] * 3))
    elif kind < 0.85:
        del inner[path[-1]]
    elif isinstance(inner, dict):
        inner[rng.choice(("unknown", "", "tasks_", "Path", 7, "role"))] = replacement(rng)
    else:
        inner.append(replacement(rng))


def spoil(rng: random.Random, content: bytes) -> bytes:
    """Cut, flip, repeat or insert some bytes."""
    if not content:
        return b"\xff"
    at = rng.randrange(len(content))
    kind = rng.randrange(5)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
    if kind == 2:
        return content[:at] + content[max(0, at - 40) :]
    if kind == 3:
        return (
            content[:at]
            + rng.choice((b"\x00", b"\xff\xfe", b"\t", b"{", b"]", b'"', b"\r\n", b"\xed\xa0\x80", b"&a *a"))
            + content[at:]
        )
    return content.decode("utf-8", "replace").encode(rng.choice(("utf-16", "utf-8-sig", "latin-1")), "replace")


# ---- The world ----


class World:
    """A model, a tokenizer, files of pairs and reference losses, made once, and the cases that are made of them.

    Args:
        folder (`Path`): A temporary folder.
    """

    def __init__(self, folder: Path):
        self.folder, self.number = folder, 0
        (folder / "a" / "b" / "c").mkdir(parents=True)  # and nothing is above it but a folder of `results`
        os.chdir(folder / "a" / "b" / "c")  # a junk path may be `.` or `../..`, and `datasets` looks through folders
        self.model = folder / "model"
        tokenizer = make_tokenizer()
        save(make_model(len(tokenizer)), tokenizer, self.model)
        self.tokenizer = tokenizer
        self.rows = {task: make_rows(task, 6, seed=0) for task in TASKS}
        (folder / "data").mkdir()
        for task in TASKS:
            for split in ("train", "test"):
                lines = [json.dumps(row) for row in make_rows(task, 6, seed=split == "test")]
                (folder / "data" / f"{task}_{split}.jsonl").write_text("\n".join(lines))
        self._save_losses()

    def recipe(self) -> dict[str, Any]:
        """A recipe that passes."""
        return {
            **QUICK,
            "model_name_or_path": str(self.model),
            "output_dir": str(self.folder / "run"),
            "tasks": [
                {
                    "task": task,
                    "path": "json",
                    "data_files": {
                        "train": str(self.folder / "data" / f"{task}_train.jsonl"),
                        "test": str(self.folder / "data" / f"{task}_test.jsonl"),
                    },
                    "eval_split": "test",
                    "columns": ["prompt", "chosen", "rejected"],
                    "chat_template_kwargs": {"enable_thinking": False},
                    "specialist_args": {"max_steps": 3},
                }
                for task in TASKS
            ],
            "mixing": "ama_s",
            "mixing_lr": 0.1,
            "smoothing": 0.1,
            "compare": ["uniform"],
            "specialist_args": {"max_steps": 12, "learning_rate": 1.0e-4},
            "use_peft": True,
            "lora_r": 4,
            "lora_target_modules": "all-linear",
            "loss_type": ["sigmoid"],
            "max_train_pairs": 5,
            "drop_truncated": True,
            "learning_rate": 5.0e-3,
            "max_steps": 6,
            "seed": 3,
            "env": {"TRL_AMA_FUZZ": "1"},
            "num_processes": 1,
        }

    # ---- Recipes ----

    def case_recipe(self, rng: random.Random) -> Outcome:
        """A recipe with a few mistakes, as file and as flags."""
        recipe, flags = self.recipe(), []
        known = self.known_keys
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            kind = rng.random()
            if kind < 0.45:
                change(rng, recipe)
            elif kind < 0.75:
                recipe[rng.choice(known)] = junk(rng)
            elif kind < 0.9:
                value = junk(rng)
                text = value if isinstance(value, str) else json.dumps(value, default=str)
                flags += [f"--{rng.choice(known)}", text.replace("\x00", "").encode("utf-8", "replace").decode()]
            else:
                flags += rng.choice(
                    (["--tasks"], ["--tasks", "{task: a"], ["--tasks", "[[[["], ["--config"], ["word"], ["--learning_rate=x"],
                     ["--specialist_args", "{a: "], ["--tasks", "{task: a, path: json, data_files: x.jsonl}"], ["--nothing", "5"])
                )  # fmt: skip
        try:
            content = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=False).encode("utf-8", "surrogatepass")
        except (yaml.YAMLError, RecursionError, TypeError):
            content = json.dumps(recipe, default=str).encode()
        if rng.random() < 0.25:
            content = self._spoiled_yaml(rng, content)
        path = self.folder / f"recipe{self.number}.yaml"
        path.write_bytes(content)
        try:
            return self.command(["--config", str(path), *flags])
        finally:
            path.unlink()

    def _spoiled_yaml(self, rng: random.Random, content: bytes) -> bytes:
        laughs = b"\n".join(
            [b"laugh0: &l0 [x, x]"]
            + [b"laugh%d: &l%d [%s]" % (n, n, b", ".join([b"*l%d" % (n - 1)] * 9)) for n in range(1, 9)]
        )
        extra = rng.choice((
            b"seed: 7\nseed: 8\n", b"tasks: *nobody\n", b"a: &a [*a]\n", b"tasks: &a [*a]\n", b"x: !!python/object/apply:os.getcwd []\n",
            b"--- \nb: 1\n", b"<<: 5\n", b"template_date: 2025-13-45\n", b"template_date: 2025-02-03\n", b"seed: " + b"9" * 5000 + b"\n",
            b"specialist_args: " + b"[" * 3000 + b"\n", b"tasks: " + b"[" * 200 + b"]" * 200 + b"\n", b"? [1, 2]\n: 3\n", b"1: 2\nnull: 3\n",
            b"learning_rate: 1e-4\nmax_steps: 1_000\n", b"seed: 0x7fffffffffffffffff\n", b"env: [1]\n", b"env: {A=B: 1}\n", b'env: {"": 1}\n',
            b'env: {"A\\0": 1}\n', b"env: {A: {b: 1}}\n", b"tasks: " + b"{a: " * 500 + b"\n", laughs + b"\n", laughs + b"\ntasks: *l8\n",
            b"max_length: 1:30\n", b"\tseed: 1\n", b"%YAML 9.9\n", b"seed: !!int abc\n", b"seed: !!float x\n", b"x: !!binary ///\n",
        ))  # fmt: skip
        return rng.choice((content + extra, extra + content, extra, spoil(rng, content)))

    @property
    def known_keys(self) -> list[str]:
        """Every key that a recipe may have, of `accelerate launch`, too."""
        from accelerate.commands.launch import launch_command_parser

        from trl_ama.scripts.common import make_parser, option_names

        if not hasattr(self, "_known"):
            ours, theirs = set(option_names(make_parser("ama"))), set(option_names(launch_command_parser()))
            names = sorted(name for name in ours | theirs if "-" not in name and len(name) > 1)
            # Ours more often than the two hundred of the Trainer
            self._known = names + 4 * [*self.recipe(), "tasks_dir", "test_split_size", "max_eval_pairs", "drop_empty", "template_date",
                                       "reference_losses", "losses_config", "hub_specialist_id", "specialists", "excess_clip", "sampling",
                                       "prefix_sharing", "max_length", "beta", "save_strategy", "eval_strategy", "dtype"]  # fmt: skip
        return self._known

    def command(self, argv: list[str]) -> Outcome:
        """What `trl ama` does before it trains."""
        from trl_ama.pipeline.start import STAGES, check_recipe, describe_plan
        from trl_ama.recipe.settings import RunSettings
        from trl_ama.scripts.common import make_parser, parse_arguments, read_config, report_errors, split_arguments

        def run():
            with report_errors("ama"):
                read_config(argv)
                _, script_args = split_arguments(make_parser("ama", prog="trl ama"), argv)
                settings = RunSettings(*parse_arguments(make_parser("ama", prog="trl ama"), script_args))
                check_recipe(settings)
                describe_plan(settings, STAGES)
            return settings

        return outcome_of(run)

    # ---- Files of pairs ----

    def case_rows(self, rng: random.Random) -> Outcome:
        """Files with mistakes in their rows or bytes, through a sound recipe and, if that takes them, the trainer's tokenisation."""
        folder = self.folder / f"rows{self.number}"
        folder.mkdir()
        recipe = {key: value for key, value in self.recipe().items() if key not in ("tasks", "env", "num_processes")}
        recipe |= {"tasks_dir": str(folder), "tasks": [{"task": task} for task in TASKS]}
        recipe["drop_truncated"], recipe["drop_empty"] = rng.random() < 0.3, rng.random() < 0.5
        if rng.random() < 0.3:
            recipe["test_split_size"] = rng.choice((0.1, 0.5, 0.9, 0.99))
        if rng.random() < 0.2:
            recipe["tasks"][0]["chat_template_kwargs"] = {"a": junk(rng)}
        for task in TASKS:
            rows = copy.deepcopy(self.rows[task])
            if task == TASKS[0] or rng.random() < 0.2:
                rows = self._changed_rows(rng, rows)
                self._write(rng, folder, task, rows)
            else:
                (folder / f"{task}_train.jsonl").write_text("\n".join(map(json.dumps, rows)))
        if rng.random() < 0.4:  # the same, as files that the tasks name
            recipe.pop("tasks_dir")
            for entry in recipe["tasks"]:
                (path,) = folder.glob(f"{entry['task']}_train.*")
                kind = next(kind for kind in ("json", "csv", "parquet") if f".{kind}" in path.name)
                entry |= {"path": kind, "data_files": str(path)}
                if rng.random() < 0.3:
                    entry["columns"] = rng.choice(
                        (["chosen", "rejected"], {"prompt": "prompt", "chosen": "rejected", "rejected": "chosen"}, {"a": "prompt"}, {}, [],
                         {"chosen": "chosen", "rejected": "chosen"}, ["prompt", "prompt", "chosen"], {5: "prompt"})
                    )  # fmt: skip
                if rng.random() < 0.3:
                    entry["format"] = rng.choice(("hh_rlhf", "single_turn", "other"))
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe, allow_unicode=False))
        outcome = self.command(["--config", str(path)])
        if outcome.name == "success" and rng.random() < 0.5:
            from trl_ama.dpo.pair_trainer import SpecialistTrainer

            # What the first stage does with the pairs
            def prepare(settings):
                for task in settings.recipe.task_names:
                    SpecialistTrainer(
                        model=settings.recipe.model_name,
                        args=settings.recipe.specialist_arguments(settings.recipe.task_args.tasks[0]),
                        train_dataset=settings.inputs.pairs_of(task, "train").remove_columns("task"),
                        peft_config=settings.inputs.peft_config(),
                    )

            return outcome_of(lambda: prepare(self._last_settings), is_new=False)
        return outcome

    def _changed_rows(self, rng: random.Random, rows: list[Any]) -> list[Any]:
        kind = rng.random()
        if kind < 0.3:  # plain text in place of messages
            rows[:] = [{name: side[0]["content"] for name, side in row.items()} for row in rows]
        elif kind < 0.4:
            rows[:] = [
                {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in rows
            ]
        elif kind < 0.45:
            rows[:] = [
                {
                    name: f"\n\nHuman: {row['prompt'][0]['content']}\n\nAssistant: {row[name][0]['content']}"
                    for name in ("chosen", "rejected")
                }
                for row in rows
            ]
        for _ in range(rng.choice((0, 1, 1, 2, 4))):
            kind, row = rng.random(), rng.choice(rows)
            if kind < 0.5:
                change(rng, row if isinstance(row, dict) else rows)
            elif kind < 0.7 and all(isinstance(row, dict) for row in rows):  # in all rows, so that the types agree
                name, value = (
                    rng.choice(("prompt", "chosen", "rejected", "tools", "chat_template_kwargs", "task", "pair_id")),
                    junk(rng),
                )
                for row in rows:
                    row[name] = value
            elif kind < 0.8:
                rows[rng.randrange(len(rows))] = junk(rng)
            elif isinstance(row, dict):
                row[rng.choice(("prompt", "chosen", "rejected"))] = rng.choice((
                    [], [[]], [{}], [{"role": "user"}], [{"content": "x"}], [{"role": 5, "content": "x"}], [{"role": "user", "content": 5}],
                    [{"role": "user", "content": None}], [{"role": "user", "content": [{"type": "text", "text": "x"}]}], [None], "x" * 100_000,
                    [{"from": "human", "value": "x"}], [{"role": "user", "content": "x", "tool_calls": [{"a": 1}]}], {"role": "user", "content": "x"},
                    "[{'role': 'user'}]", [{"role": "alien", "content": "x"}] * 3, "\u2028", "<pad></s>", ["a", "b"], "a\x00b",
                ))  # fmt: skip
        return rows

    def _write(self, rng: random.Random, folder: Path, task: str, rows: list[Any]) -> None:
        kind = rng.choice(("jsonl", "jsonl", "jsonl", "jsonl", "json", "csv", "parquet", "jsonl.gz"))
        content = "\n".join(json.dumps(row) for row in rows).encode()
        if kind == "json":
            content = json.dumps(rows).encode()
        elif kind == "csv":
            import csv

            file = io.StringIO()
            writer = csv.DictWriter(file, ["prompt", "chosen", "rejected"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(row for row in rows if isinstance(row, dict))
            content = file.getvalue().encode("utf-8", "surrogatepass")
        elif kind == "parquet":
            from datasets import Dataset

            file = io.BytesIO()
            try:
                Dataset.from_list(rows).to_parquet(file)
                content = file.getvalue()
            except Exception:  # rows that Arrow cannot hold are no Parquet file
                content = b"PAR1"
        if rng.random() < 0.3 and kind == "parquet":
            # Cut off, no more: Arrow crashes on some pages with a flipped bit, which no Python can catch
            content = content[: rng.randrange(len(content))]
        elif rng.random() < 0.3:
            content = rng.choice((spoil(rng, content), b"", b"\n\n", b"[]", b"{}", b"null", b"5\n6\n"))
        if kind.endswith("gz"):
            content = gzip.compress(content)
            if rng.random() < 0.5:
                content = spoil(rng, content)
        (folder / f"{task}_train.{kind}").write_bytes(content)

    # ---- Datasets in memory ----

    def case_trainer(self, rng: random.Random) -> Outcome:
        """A dataset with a bad column, or bad arguments, given to `AMATrainer`."""
        import numpy as np
        from datasets import ClassLabel, Dataset, DatasetDict

        from trl_ama import AMAConfig, AMATrainer

        rows = [{**row, "task": task} for task in TASKS for row in self.rows[task]]
        count = len(rows)
        data = Dataset.from_list(rows)
        logps = ("ref_chosen_logps", "ref_rejected_logps", "specialist_chosen_logps", "specialist_rejected_logps")
        for column in logps:
            data = data.add_column(column, np.full(count, -9.0, dtype=np.float32))
        held_out = data.select(range(0, count, 2))
        arguments: dict[str, Any] = {"specialists": None, "ref_model": None, "peft_config": None}
        settings = {"mixing": "ama_s", "max_steps": 2, "output_dir": str(self.folder / "trainer")}

        def bad(dataset):
            name = rng.choice(
                (*logps, "task", "task", "prompt", "chosen", "rejected", "chosen_tokens", "pair_id", "tools")
            )
            if rng.random() < 0.2 and name in dataset.column_names:
                return dataset.remove_columns(name)
            value = rng.choice(
                (junk(rng), float("nan"), 1e39, "list", [{"role": "user", "content": "x"}], [1.5], {"a": 1})
            )
            where = rng.choice(("all", "one"))
            values = list(dataset[name]) if name in dataset.column_names else [None] * len(dataset)
            values = [value] * len(values) if where == "all" else [*values[:-1], value]
            try:
                column = Dataset.from_dict({name: values})
            except Exception:  # what Arrow cannot hold never becomes a dataset
                return dataset
            dataset = dataset.remove_columns(name) if name in dataset.column_names else dataset
            return dataset.add_column(name, column[name], feature=column.features[name])

        for _ in range(rng.choice((1, 1, 2))):
            kind = rng.random()
            if kind < 0.5:
                data = bad(data) if isinstance(data, Dataset) else data
            elif kind < 0.6:
                held_out = bad(held_out) if isinstance(held_out, Dataset) else held_out
            elif kind < 0.7:
                arguments["specialists"] = rng.choice(
                    (junk(rng), {"list": junk(rng)}, dict.fromkeys(TASKS, "/nowhere"), {"list": None, "sort": None})
                )
            elif kind < 0.8:
                settings |= {rng.choice(("mixing", "mixing_lr", "smoothing", "excess_clip", "sampling", "loss_type", "max_length",
                                         "prefix_sharing", "seed", "metric_for_best_model", "truncation_mode")): junk(rng)}  # fmt: skip
            elif kind < 0.9:
                data = rng.choice((None, [], {}, "path", rows, data.select([]), DatasetDict({"train": data}), 5, data.with_format("numpy"),
                                   data.select([0] * 12), data.cast_column("task", ClassLabel(names=["list", "sort", "x"])))
                                  if isinstance(data, Dataset) else (None, 5))  # fmt: skip
            else:
                empty = held_out.select([]) if isinstance(held_out, Dataset) else None
                held_out = rng.choice(([], "path", 5, rows, empty, {"a": held_out, "b": None}, {"a": 5}, {}))

        def run():
            from trl_ama.common.errors import AMAError

            try:
                config = AMAConfig(**{**QUICK, **settings})
            except AMAError:
                raise
            except (
                TypeError,
                ValueError,
            ) as error:  # TRL's and transformers' own checks of what Python code gives them
                raise AMAError(str(error)) from error
            AMATrainer(
                str(self.model),
                args=config,
                train_dataset=data,
                eval_dataset=held_out,
                processing_class=self.tokenizer,
                **arguments,
            )

        return outcome_of(run)

    # ---- Streams ----

    def case_streams(self, rng: random.Random) -> Outcome:
        """Streams with mistakes in their rows, of which `AMATrainer` reads two windows."""
        from datasets import Dataset, IterableDataset

        from trl_ama import AMATrainer

        logps = ("ref_chosen_logps", "ref_rejected_logps", "specialist_chosen_logps", "specialist_rejected_logps")
        streams: Any = {}
        for task in TASKS:
            rows = copy.deepcopy(self.rows[task])
            is_bad = task == TASKS[0] or rng.random() < 0.2
            if is_bad:
                rows = self._changed_rows(rng, rows)
            rows = [{**dict.fromkeys(logps, -9.0), **row} if isinstance(row, dict) else row for row in rows]
            if is_bad:
                if rng.random() < 0.4 and all(isinstance(row, dict) for row in rows) and rows:
                    name = rng.choice((*logps, "task", "chosen_tokens", "chat_template_kwargs", "tools", "prompt"))
                    rng.choice(rows)[name] = junk(rng)
            streams[task] = IterableDataset.from_generator(_each_of, gen_kwargs={"rows": [rows]})
        kind = rng.random()
        if kind < 0.1:
            streams[rng.choice((*TASKS, "other", "", 5))] = rng.choice(
                (junk(rng), Dataset.from_list(self.rows["list"]))
            )
        elif kind < 0.2:
            streams = rng.choice((streams[TASKS[0]], {}, streams[TASKS[0]].shuffle(seed=0), list(streams.values())))
        settings = {"max_steps": rng.choice((2, 2, 2, 2, -1)), "streaming_buffer": rng.choice((1, 3, 1000))}
        settings |= {
            "output_dir": str(self.folder / "streams"),
            "mixing": rng.choice(("ama_s", "ama_s", "uniform", "proportional")),
        }

        def run():
            from trl_ama import AMAConfig

            args = AMAConfig(**{**QUICK, **settings})
            trainer = AMATrainer(str(self.model), args=args, train_dataset=streams, processing_class=self.tokenizer)
            for index in range(12 * len(TASKS)):
                trainer.train_dataset[index]

        return outcome_of(run)

    # ---- Loss folders ----

    def _save_losses(self) -> None:
        from datasets import Dataset

        from trl_ama.reference_losses.files import save_task
        from trl_ama.tasks.pairs import add_pair_ids

        self.losses = self.folder / "losses"
        for task in TASKS:
            rows = add_pair_ids(Dataset.from_list(self.rows[task]))
            columns = {
                "ref_chosen_logps": -9.0,
                "ref_rejected_logps": -9.0,
                "specialist_chosen_logps": -8.0,
                "specialist_rejected_logps": -10.0,
            }
            for name, value in {**columns, "chosen_tokens": 4, "rejected_tokens": 4, "task": task}.items():
                rows = rows.add_column(name, [value] * len(rows))
            save_task(
                self.losses,
                task,
                {"train": rows, "test": rows},
                {"task": task, "base_model": "a@sha256:0"},
                {"train": []},
            )

    def case_losses(self, rng: random.Random) -> Outcome:
        """A folder of reference losses in which a file has changed."""
        import shutil

        from trl_ama import load_reference_losses
        from trl_ama.common.files import write_json
        from trl_ama.reference_losses.checks import sha256

        folder = self.folder / f"losses{self.number}"
        shutil.copytree(self.losses, folder)
        target = folder / rng.choice(TASKS)
        kind, path = rng.random(), target / rng.choice(("train.parquet", "test.parquet"))
        note = json.loads((target / "fingerprint.json").read_text())
        if kind < 0.4:
            for _ in range(rng.randint(1, 3)):
                change(rng, note)
            try:
                write_json(target / "fingerprint.json", note)
            except (UnicodeEncodeError, TypeError):  # what no file can hold
                (target / "fingerprint.json").write_text(json.dumps(note, default=str))
        elif kind < 0.5:
            (target / "fingerprint.json").write_bytes(spoil(rng, (target / "fingerprint.json").read_bytes()))
        elif kind < 0.65:
            path.write_bytes(spoil(rng, path.read_bytes()))
        else:  # with a note that fits
            from datasets import Dataset

            rows = Dataset.from_parquet(str(path)).to_list()
            for _ in range(rng.randint(1, 2)):
                if rng.random() < 0.5:
                    change(rng, rng.choice(rows))
                else:
                    name, value = rng.choice(list(rows[0])), rng.choice((junk(rng), float("nan"), 5.0, -1e30, "list"))
                    for row in rows:
                        row[name] = value
            try:
                Dataset.from_list(rows).to_parquet(str(path))
            except Exception:
                path.write_bytes(b"PAR1PAR1")
            if rng.random() < 0.9:
                note["files"][path.name] = {"rows": len(rows), "sha256": sha256(path)}
                write_json(target / "fingerprint.json", note)
        outcome = outcome_of(lambda: load_reference_losses(str(folder)))
        shutil.rmtree(folder)
        return outcome

    # ---- ----

    def run(self, seed: int, number: int) -> tuple[str, Outcome]:
        """One case, by its number."""
        import shutil

        rng = case_rng(seed, number)
        self.number, kind = number, kind_of(rng)
        before = dict(os.environ)
        try:
            outcome = getattr(self, f"case_{kind}")(rng)
        finally:
            os.environ.clear()
            os.environ.update(before)
            shutil.rmtree(self.folder / f"rows{number}", ignore_errors=True)
        return kind, outcome


def _each_of(rows: list[list[Any]]):
    """The generator of a stream, whose rows are one shard."""
    yield from rows[0]


World._last_settings = None


def case_rng(seed: int, number: int) -> random.Random:
    """What a case is made with."""
    return random.Random(f"{seed} {number}")


def kind_of(rng: random.Random) -> str:
    """The first that is drawn for a case."""
    return rng.choices(list(KINDS), KINDS.values())[0]


def outcome_of(function, is_new: bool = True) -> Outcome:
    """Run a function that may raise, and say how it ended."""
    from accelerate.state import AcceleratorState

    from trl_ama.common.errors import AMAError

    said = io.StringIO()
    if is_new:
        AcceleratorState._reset_state(reset_partial_state=True)  # another case had other arguments
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with watched(SECONDS):
                World._last_settings = function()
            return Outcome("success", "")
        except AMAError as error:
            result = Outcome("AMAError", " ".join(str(error).split()))
        except SystemExit as error:
            lines = said.getvalue().strip().splitlines()
            # The value that argparse quotes may have lines of its own
            lines = [line for line in lines if ": error: " in line or line.startswith("usage: ")]
            if error.code != 2 or not lines or ": error: " not in lines[-1]:
                return Outcome("traceback", f"exit code {error.code}: {said.getvalue()[-500:]}")
            usage = any(line.startswith("usage: ") for line in lines)
            result = Outcome("argparse" if usage else "AMAError", lines[-1])
        except _HangError:
            return Outcome("hang", traceback.format_exc())
        except BaseException:
            return Outcome("traceback", traceback.format_exc())
    return result if len(result.text) <= LONGEST else Outcome("long", result.text[:500])


@contextlib.contextmanager
def silence():
    """No logs and no bars, here and in what comes of `log_level` in a case."""
    import datasets
    import transformers

    before = [(module.logging, module.logging.get_verbosity()) for module in (datasets, transformers)]
    datasets.disable_progress_bars()
    for logging, _ in before:
        logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.enable_progress_bars()
        for logging, level in before:
            logging.set_verbosity(level)


def results(folder: Path, seed: int, numbers: range):
    """Number, kind and outcome of each case.

    They run in a child that makes its own world, so that one that ends the interpreter, or hangs where Python cannot interrupt
    it, is an outcome, too; and so that this process, which forks, has no threads whose locks the child would wait for.
    """
    numbers = list(numbers)
    while numbers:
        reads, writes = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reads)
            try:
                with os.fdopen(writes, "w", encoding="utf-8") as out, silence():
                    world = World(Path(tempfile.mkdtemp(dir=folder)))
                    keep_and_freeze()
                    for number in numbers:
                        kind, outcome = world.run(seed, number)
                        out.write(json.dumps([kind, *outcome]) + "\n")
                        out.flush()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)  # whatever comes, as the parent cleans up
        os.close(writes)
        ended = "crash"
        with os.fdopen(reads, "rb", buffering=0) as pipe:
            rest = b""
            while True:
                if not select.select([pipe], [], [], 6 * SECONDS)[0]:
                    os.kill(child, signal.SIGKILL)
                    ended = "hang"
                    break
                content = pipe.read(1 << 16)
                if not content:
                    break
                *lines, rest = (rest + content).split(b"\n")
                for line in lines:
                    kind, *outcome = json.loads(line)
                    yield numbers.pop(0), kind, Outcome(*outcome)
        status = os.waitpid(child, 0)[1]
        if numbers:
            number = numbers.pop(0)
            yield number, kind_of(case_rng(seed, number)), Outcome(ended, f"the process ended with {status}")


def fuzz(cases: int, seed: int = 0, start: int = 0, talk: bool = False) -> tuple[Counter, list[str]]:
    """Run cases; return how many ended how, by kind, and what is to be said about those that failed."""
    counts, failures, begun = Counter(), [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for number, kind, outcome in results(Path(folder), seed, range(start, start + cases)):
            counts[kind, outcome.name] += 1
            said = f"case {number} ({kind}): {outcome.name}\n{outcome.text}"
            if outcome.name in FAILURES:
                failures.append(said)
            if talk and (cases == 1 or outcome.name in FAILURES):
                print(said, flush=True)
            if talk and (number + 1 - start) % 50 == 0:
                print(
                    f"{number + 1 - start} cases, {time.monotonic() - begun:.0f} s, {len(failures)} failures",
                    flush=True,
                )
    return counts, failures


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=2500)
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="file to write counts and failures to")
    args = parser.parse_args(argv)
    counts, failures = fuzz(args.cases, args.seed, args.start, talk=True)
    names = sorted({name for _, name in counts})
    print(f"\n{'':10}" + "".join(f"{name:>11}" for name in names))
    for kind in KINDS:
        print(f"{kind:10}" + "".join(f"{counts[kind, name]:>11}" for name in names))
    print(f"{'all':10}" + "".join(f"{sum(counts[kind, name] for kind in KINDS):>11}" for name in names))
    if args.json is not None:
        ends = {kind: {name: counts[kind, name] for name in names} for kind in KINDS}
        Path(args.json).write_text(json.dumps({"counts": ends, "failures": failures}))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
