"""The trainers are lists of parts: which, in which order, and what parts may know of each other."""

import ast
import inspect
import re
from pathlib import Path

import pytest
from peft import LoraConfig
from tiny_pairs import make_dataset
from trl import DPOTrainer

import trl_ama
from trl_ama.dpo.ama_trainer import AMATrainer
from trl_ama.dpo.pair_trainer import PairTrainer, ScoringTrainer, SpecialistTrainer
from trl_ama.dpo.reference_trainer import ReferenceLogProbs
from trl_ama.dpo.start_errors import StartErrors
from trl_ama.pipeline.generalists import GeneralistTrainer
from trl_ama.sampling.sampler import TaskMixtureSampler
from trl_ama.sampling.streams import StreamSampler
from trl_ama.training.by_task import EvaluationByTask
from trl_ama.training.checkpoints import complete_checkpoint
from trl_ama.training.exact_resume import ExactResume
from trl_ama.training.finite_steps import FiniteSteps
from trl_ama.training.mixed import MixedTraining
from trl_ama.training.progress import ResumedProgress
from trl_ama.training.published import Published
from trl_ama.training.stage import TrainingStage
from trl_ama.training.tracking import begin_runs


PACKAGE = Path(trl_ama.__file__).parent
PARTS = [MixedTraining, EvaluationByTask, Published, ExactResume, ReferenceLogProbs, FiniteSteps, StartErrors]
OF_PAIRS = [PairTrainer, FiniteSteps, StartErrors]
OF_AMA = [AMATrainer, MixedTraining, EvaluationByTask, Published, ExactResume, ReferenceLogProbs, *OF_PAIRS]
ORDERS = {
    PairTrainer: OF_PAIRS,
    ScoringTrainer: [ScoringTrainer, *OF_PAIRS],
    SpecialistTrainer: [SpecialistTrainer, ExactResume, *OF_PAIRS],
    AMATrainer: OF_AMA,
    GeneralistTrainer: [GeneralistTrainer, *OF_AMA],
}
# Something of each file that is of any trainer, whatever its objective
OF_ANY_OBJECTIVE = [
    MixedTraining, EvaluationByTask, Published, ExactResume, ResumedProgress, FiniteSteps, TrainingStage, complete_checkpoint, begin_runs,
]  # fmt: skip


def own(cls):
    """The names that a class defines itself."""
    return {name for name in {**vars(cls), **inspect.get_annotations(cls)} if not re.fullmatch(r"__\w+__", name)}


@pytest.mark.parametrize("trainer", ORDERS, ids=lambda trainer: trainer.__name__)
def test_each_trainer_is_its_parts_in_this_order(trainer):
    assert list(trainer.__mro__) == [*ORDERS[trainer], *DPOTrainer.__mro__]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_a_part_has_no_base(part):
    assert part.__bases__ == (object,)


def test_who_answers_first_where_several_parts_answer():
    """What one part does before another decides figures: the order of every hook, not only of classes."""
    names = {name for cls in OF_AMA for name in own(cls)}
    orders = {
        name: [cls.__name__ for cls in OF_AMA if name in vars(cls)] for name in names if hasattr(DPOTrainer, name)
    }
    assert {name: order for name, order in orders.items() if len(order) > 1} == {
        "_precompute_ref_logps": ["ReferenceLogProbs", "PairTrainer"],
        "_prepare_dataset": ["PairTrainer", "StartErrors"],
        "_push_from_checkpoint": ["Published", "ExactResume"],
        "_save_checkpoint": ["MixedTraining", "ExactResume"],
        "compute_ref_log_probs": ["ReferenceLogProbs", "PairTrainer"],
        "create_model_card": ["AMATrainer", "Published"],
        "evaluate": ["EvaluationByTask", "ReferenceLogProbs"],
        "get_batch_samples": ["MixedTraining", "PairTrainer"],
        "get_eval_dataloader": ["EvaluationByTask", "PairTrainer"],
        "get_test_dataloader": ["EvaluationByTask", "PairTrainer"],
        "get_train_dataloader": ["EvaluationByTask", "ExactResume", "PairTrainer", "StartErrors"],
        "predict": ["EvaluationByTask", "ReferenceLogProbs"],
        "train": ["Published", "ExactResume", "PairTrainer", "FiniteSteps"],
    }


def test_callbacks_come_in_the_order_of_parts_from_below(model_dir, quick_args):
    """Whether a step is sound is asked before a signal's save, and what the run was is restored before the mixture."""
    pairs = make_dataset({"list": 4, "sort": 4})
    trainer = AMATrainer(model_dir, args=quick_args(mixing="uniform"), train_dataset=pairs, peft_config=LoraConfig())
    files = [type(callback).__module__ for callback in trainer.callback_handler.callbacks]
    files = [file for file in files if file.startswith("trl_ama")]
    assert files == [
        inspect.getmodule(part).__name__
        for part in (FiniteSteps, PairTrainer, PairTrainer, ExactResume, MixedTraining)
    ]


def test_what_parts_read_of_each_other_is_told():
    """A public attribute of two parts is named under `Attributes` of each, or is a method."""
    for name in {name for part in PARTS for name in own(part)}:
        holders = [part for part in PARTS if name in own(part)]
        if name.startswith("_") or hasattr(DPOTrainer, name):
            continue
        for part in holders:
            value = vars(part).get(name)
            told = value if inspect.isfunction(value) or isinstance(value, property) else part
            assert told.__doc__, f"{part.__name__}.{name}"
            if told is part:
                assert f" {name} (" in part.__doc__, f"{part.__name__}.{name} is not in its docstring"


def test_our_names_are_not_the_libraries():
    """A part's own attribute must not be one that a trainer of TRL or transformers keeps."""
    sources = "".join(inspect.getsource(inspect.getmodule(cls)) for cls in DPOTrainer.__mro__[:-1])
    taken = set(re.findall(r"\bself\.(\w+)\b", sources))
    hooks = {name for name in taken if hasattr(DPOTrainer, name)}
    for part in (*PARTS, PairTrainer, AMATrainer):
        assert not (own(part) & taken) - hooks, part.__name__


@pytest.mark.parametrize("something", OF_ANY_OBJECTIVE, ids=lambda something: something.__name__)
def test_what_is_of_any_trainer_knows_no_objective(something):
    source = inspect.getsource(inspect.getmodule(something))
    assert not re.findall(r"DPO|logps|chosen_|rejected_|import trl|from trl ", source)


def private_names(tree):
    """The private names of a module: those that it makes, and those that it uses of something else."""
    made, used = set(), {}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names = [node.id]
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "clone", "own"):
                names = [node.attr]
            else:
                used.setdefault(node.attr, node.lineno)
        elif isinstance(node, ast.Attribute):
            used.setdefault(node.attr, node.lineno)
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("trl_ama")):
            for alias in node.names:
                used.setdefault(alias.name, node.lineno)
        made.update(names)
    private = re.compile(r"_(?!_)\w*").fullmatch
    return {name for name in made if private(name)}, {name: line for name, line in used.items() if private(name)}


def names_of_libraries():
    """Private names in the files that DPOTrainer is made of; docs/touch_points.md lists those that we use."""
    return {
        *re.findall(r"\b_\w+", "".join(inspect.getsource(inspect.getmodule(cls)) for cls in DPOTrainer.__mro__[:-1]))
    }


def test_no_private_name_crosses_a_file():
    files = {path: private_names(ast.parse(path.read_text())) for path in sorted(PACKAGE.rglob("*.py"))}
    theirs = names_of_libraries()
    found = []
    for path, (made, used) in files.items():
        for name, line in used.items():
            if name in made or name in theirs:
                continue
            makers = [other.name for other, (names, _) in files.items() if name in names]
            if makers:
                found.append(f"{path.name}:{line} uses {name} of {makers}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "cls", [GeneralistTrainer, SpecialistTrainer, ScoringTrainer, StreamSampler, TaskMixtureSampler]
)
def test_no_two_files_of_one_object_share_a_private_attribute(cls):
    """Which the test above cannot tell, as each of them would make the name."""
    theirs, holders = names_of_libraries(), {}
    for part in cls.__mro__:
        if part.__module__.startswith("trl_ama"):
            for name in {*re.findall(r"\bself\.(_[a-z]\w*)", inspect.getsource(part))} - theirs:
                holders.setdefault(name, set()).add(part.__module__)
    assert {name: files for name, files in holders.items() if len(files) > 1} == {}
