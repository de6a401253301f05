"""One mechanism: do the same with `DPOTrainer` and with `AMATrainer`, and hold what came of it side by side.

A scenario is what a user does with a trainer. It is run with TRL's pair and with ours in its place; logs, weights, the order
of callbacks, files and attributes have to be the same, but for what is ours by name.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, IterableDataset
from peft import LoraConfig, get_peft_model
from tiny_models import make_model
from tiny_pairs import make_dataset
from tiny_runs import QUICK
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from trl_ama import AMAConfig, AMATrainer


TASK = "list"
_OURS = re.compile(r"(?:(?:eval|test)_(?:\w+_)?)?(?:ama/|(?:worst|mean)_(?:accuracy|margin|excess|loss)$)")
_TIMES = re.compile(r"runtime|_per_second|_time$|flos")
_OUR_FILES = {"ama_files.json"}
EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]


class Recorder(TrainerCallback):
    """The callback events of a run, with the step, and the names of what was logged."""

    def __init__(self):
        self.events: list[tuple] = []


def _record(name: str):
    def event(self, args, state, control, **kwargs):
        told = tuple(sorted(comparable(kwargs.get("logs") or kwargs.get("metrics") or {})))
        self.events.append((name, state.global_step, told))

    return event


for _name in EVENTS:
    setattr(Recorder, _name, _record(_name))


def comparable(figures: dict[str, Any]) -> dict[str, Any]:
    """What DPOTrainer logs, without times."""
    return {key: value for key, value in figures.items() if not _OURS.match(key) and not _TIMES.search(key)}


def pairs(count: int = 20, seed: int = 0, **columns: Any) -> Dataset:
    """Pairs as DPOTrainer takes them, with further columns."""
    data = make_dataset({TASK: count}, seed=seed, labelled=False)
    for name, value in columns.items():
        data = data.add_column(name, [value] * count)
    return data


def with_tasks(data: Any, label: bool = False) -> Any:
    """The same pairs, each of one task."""
    if isinstance(data, dict):
        return type(data)({name: with_tasks(part) for name, part in data.items()})
    if isinstance(data, IterableDataset):
        features = Features({**data.features, "task": ClassLabel(names=[TASK])}) if label else None
        return data.map(_with_task, fn_kwargs={"task": 0 if label else TASK}, features=features)
    return data if data is None else data.add_column("task", [TASK] * len(data))


def _with_task(row: dict[str, Any], task: str | int) -> dict[str, Any]:
    return {"task": task}


@dataclass
class Pair:
    """A trainer's class and its config's, and how pairs are given to it."""

    name: str
    trainer_class: type
    config_class: type
    settings: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[Any], Any] = lambda data: data

    def train_pairs(self, data: Any) -> Any:
        return with_tasks(data, label=True) if self.prepare is with_tasks else self.prepare(data)


# The same path on both sides, so the same bits; tests/test_prefix_*.py compare the two paths
OURS = {"mixing": "proportional", "prefix_sharing": False}
THEIRS = Pair("DPOTrainer", DPOTrainer, DPOConfig)
WITH_TASK = Pair("AMATrainer with a task", AMATrainer, AMAConfig, OURS, with_tasks)
WITHOUT_TASK = Pair("AMATrainer without tasks", AMATrainer, AMAConfig, OURS)


@dataclass
class World:
    """What a scenario is given: the pair of classes under test, and builders for all else."""

    pair: Pair
    model_dir: str
    folder: Path
    tokenizer: Any
    recorder: Recorder = field(default_factory=Recorder)
    trainers: list[Any] = field(default_factory=list)

    def args(self, **settings: Any) -> Any:
        defaults = {
            **QUICK,
            "output_dir": str(self.folder / "run"),
            "per_device_train_batch_size": 4,
            "max_steps": 3,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "seed": 7,
        }
        return self.pair.config_class(**{**defaults, **self.pair.settings, **settings})

    def trainer(
        self, train: Any = None, held_out: Any = None, settings: dict[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        """The trainer under test; `settings` go into its config, the rest to it."""
        kwargs.setdefault("model", self.model_dir)
        kwargs.setdefault("args", self.args(**(settings or {})))
        kwargs.setdefault("callbacks", [])
        trainer = self.pair.trainer_class(
            train_dataset=self.pair.train_pairs(pairs() if train is None else train),
            eval_dataset=self.pair.prepare(held_out),
            **{**kwargs, "callbacks": [*kwargs["callbacks"], self.recorder]},
        )
        self.trainers.append(trainer)
        return trainer

    def model(self, **config: Any):
        torch.manual_seed(0)
        model = make_model(len(self.tokenizer), **config)
        model.config._name_or_path = self.model_dir
        return model

    def lora_model(self):
        torch.manual_seed(1)
        return get_peft_model(self.model(), lora(init_lora_weights=False))


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=4, **{"target_modules": "all-linear", **settings})


@dataclass
class Outcome:
    """What came of a scenario."""

    result: Any
    log: list[dict[str, Any]]
    events: list[tuple]
    weights: dict[str, torch.Tensor]
    files: list[str]
    trainer: Any


def outcome(world: World, scenario: Callable[[World], Any]) -> Outcome:
    result = scenario(world)
    trainer = world.trainers[-1]
    return Outcome(
        result=comparable(result) if isinstance(result, dict) else result,
        log=[comparable(entry) for entry in trainer.state.log_history],
        events=world.recorder.events,
        weights={name: value.detach().clone() for name, value in trainer.model.named_parameters()},
        files=sorted(
            str(path.relative_to(world.folder))
            for path in world.folder.rglob("*")
            if path.is_file() and path.name not in _OUR_FILES
        ),
        trainer=trainer,
    )


def assert_same(ours: Outcome, theirs: Outcome, but: frozenset[str] = frozenset()) -> None:
    """Hold two outcomes against each other, in all figures `but` some."""
    assert [_without(entry, but) for entry in ours.log] == [_without(entry, but) for entry in theirs.log]
    assert ours.events == theirs.events
    assert ours.files == theirs.files
    same_values(ours.result, theirs.result)
    assert list(ours.weights) == list(theirs.weights)
    for name, value in theirs.weights.items():
        assert torch.equal(ours.weights[name], value), name


def _without(entry: dict[str, Any], names: frozenset[str]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in names}


def same_values(ours: Any, theirs: Any) -> None:
    """Hold results of a call against each other: numbers, mappings, lists, arrays."""
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key, value in theirs.items():
            same_values(ours[key], value)
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            same_values(one, other)
    elif hasattr(theirs, "shape"):
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))
    else:
        assert ours == theirs


@pytest.fixture(name="run_both")
def run_both_fixture(model_dir, tokenizer, tmp_path):
    """Runs a scenario with DPOTrainer and with one of ours, holds the outcomes against each other, and returns both."""

    def run(
        scenario: Callable[[World], Any], ours: Pair = WITH_TASK, but: frozenset[str] = frozenset()
    ) -> tuple[Outcome, Outcome]:
        outcomes = []
        for pair in (ours, THEIRS):
            folder = tmp_path / pair.name.split()[0]
            folder.mkdir(exist_ok=True)
            outcomes.append(outcome(World(pair, model_dir, folder, tokenizer), scenario))
        assert_same(*outcomes, but)
        return outcomes[0], outcomes[1]

    return run
