"""Numbers that a run cannot do with are refused by the key's name, wherever they are given; those that it can do with are not."""

import dataclasses
import math
import typing
import warnings
from importlib.metadata import version

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from places import ROOT
from tiny_models import lora
from tiny_pairs import make_dataset
from tiny_runs import QUICK
from trl import DPOConfig, ModelConfig

from trl_ama import AMAConfig, AMAError, AMATrainer, TaskConfig, TaskMixtureConfig
from trl_ama.common.limits import FREE, LIMITS, LimitError, check_limits
from trl_ama.dpo.losses import PAIR_LOSSES, PreferenceLossConfig
from trl_ama.recipe.arguments import PipelineArguments
from trl_ama.recipe.settings import RunSettings
from trl_ama.scripts.ama_check import CheckArguments
from trl_ama.scripts.common import make_parser, parse_dataclasses


INF, NAN = math.inf, math.nan
CLASSES = (AMAConfig, ModelConfig, PipelineArguments, TaskMixtureConfig, TaskConfig, CheckArguments)


def config(**values):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AMAConfig("out", **{**QUICK, **values})


def numeric_fields(cls):
    """Names of the fields that may hold a number."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kinds = {
            member
            for part in typing.get_args(hints[field.name]) or (hints[field.name],)
            for member in (part, *typing.get_args(part))
        }
        if field.init and kinds & {int, float}:
            yield field.name


def other_versions():
    """The libraries that are not those which the table was made for."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    return [name for name in ("trl", "transformers") if version(name) != pinned[name]]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_number_is_decided_on(cls):
    undecided = [name for name in numeric_fields(cls) if name not in LIMITS and name not in FREE]
    if undecided and other_versions():
        warnings.warn(
            f"{other_versions()} have numbers that common/limits.py does not know: {undecided}",
            UserWarning,
            stacklevel=1,
        )
        return
    assert undecided == []


def test_the_table_names_only_what_there_is():
    fields = {name for cls in CLASSES for name in numeric_fields(cls)}
    assert other_versions() or set(LIMITS) | set(FREE) <= fields
    assert not set(LIMITS) & set(FREE)
    losses = {limit.given["loss_type"] for limit in LIMITS["beta"]}
    assert set(PAIR_LOSSES) <= losses


# ---- What is refused, with the range, and where it came from ----

REFUSED = [
    ({"beta": -0.1}, "'beta' must be above 0 with loss_type 'sigmoid', got -0.1"),
    ({"beta": NAN}, "'beta' must be above 0 with loss_type 'sigmoid', got nan"),
    ({"beta": 0, "loss_type": "ipo"}, "'beta' must be above 0 with loss_type 'ipo', got 0"),
    ({"beta": INF}, "'beta' must be above 0 and finite"),
    ({"loss_type": "robust", "label_smoothing": 0.5}, r"'label_smoothing' must lie in \[0, 0.5\) with loss_type 'robust', got 0.5"),
    ({"loss_type": ["sigmoid", "robust"], "label_smoothing": 0.7}, "with loss_type 'robust', got 0.7"),
    ({"loss_type": "robust", "label_smoothing": -0.1}, "with loss_type 'robust', got -0.1"),
    ({"loss_type": "exo_pair", "label_smoothing": 1.0}, r"must lie in \(0, 1\) with loss_type 'exo_pair', got 1.0"),
    ({"loss_type": "discopop", "discopop_tau": 0.0}, "'discopop_tau' must be above 0 with loss_type 'discopop', got 0.0"),
    ({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": INF}, "'f_alpha_divergence_coef' must be a finite number"),
    ({"loss_weights": [NAN]}, "'loss_weights' must be a finite number, got .nan."),
    ({"loss_weights": [0.0]}, "'loss_weights' must not all be 0"),
    ({"sync_ref_model": True, "ref_model_sync_steps": 0}, "'ref_model_sync_steps' must be at least 1 with sync_ref_model true, got 0"),
    ({"sync_ref_model": True, "ref_model_mixup_alpha": 1.5}, r"'ref_model_mixup_alpha' must lie in \[0, 1\] with sync_ref_model true"),
    ({"learning_rate": INF}, "'learning_rate' must be at least 0 and finite, got inf"),
    ({"learning_rate": -1e-4}, "'learning_rate' must be at least 0, got -0.0001"),
    ({"learning_rate": "1e-4"}, "'learning_rate' must be a number, got '1e-4'. YAML takes 1e-4 for text: write 1.0e-4"),
    ({"beta": "0.1"}, "'beta' must be a number, got '0.1'. Leave the quotes out"),
    ({"per_device_train_batch_size": 0}, "'per_device_train_batch_size' must be at least 1, got 0"),
    ({"gradient_accumulation_steps": -1}, "'gradient_accumulation_steps' must be at least 1, got -1"),
    ({"max_length": 0}, "'max_length' must be at least 2, got 0"),
    ({"num_train_epochs": NAN}, "'num_train_epochs' must be a finite number, got nan"),
    ({"max_grad_norm": NAN}, "'max_grad_norm' must be a number, got nan"),
    ({"seed": 2**32}, r"'seed' must lie in \[0, 2\*\*32\), got 4294967296"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "text"), REFUSED, ids=lambda value: str(value)[:40])
def test_refused(values, text):
    with pytest.raises(AMAError, match=text) as caught:
        config(**values)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("Of AMAConfig, ")


# What DPOTrainer makes sense of, or never looks at
TAKEN = [
    {"learning_rate": 0}, {"max_grad_norm": INF}, {"max_grad_norm": -1}, {"max_steps": -7}, {"eval_delay": INF}, {"save_total_limit": 0},
    {"label_smoothing": 0.7}, {"discopop_tau": 0.0}, {"ref_model_mixup_alpha": 7.0}, {"warmup_steps": 0.1}, {"logging_steps": 0.5},
    {"loss_weights": [0.0, 1.0], "loss_type": ["sigmoid", "hinge"]}, {"ld_alpha": 1.5}, {"pad_to_multiple_of": "auto"}, {"weight_decay": 0},
    {"precompute_ref_batch_size": 0}, {"dataset_num_proc": 0}, {"num_train_epochs": 0.01},
]  # fmt: skip


@pytest.mark.parametrize("values", TAKEN, ids=str)
def test_taken_as_by_dpo_trainer(values):
    theirs = DPOConfig("out", **{**QUICK, **values})
    assert {name: getattr(config(**values), name) for name in values} == {
        name: getattr(theirs, name) for name in values
    }


def test_where_it_came_from(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("beta: 0.1\nlearning_rate: .inf\nlora_r: 0\n", encoding="utf-8")
    flags = ["--output_dir", "out", "--use_cpu", "true", "--bf16", "false"]

    def said(*argv):
        with pytest.raises(AMAError) as caught:
            parse_dataclasses(make_parser("ama", prog="trl ama"), [*flags, *argv])  # which keeps what a file has said
        return str(caught.value)

    assert said("--beta", "-1").startswith("On the command line, 'beta' must be above 0")
    assert said("--lora_dropout=1.5").startswith("On the command line, 'lora_dropout' must lie in [0, 1), got 1.5")
    assert said("--test_split_size", "2").startswith("On the command line, 'test_split_size' must lie in (0, 1)")
    assert said("--config", str(recipe)).startswith(f"The config file {recipe}, line 2: 'learning_rate' must be")
    assert said("--config", str(recipe), "--learning_rate", "1e-4").startswith(
        f"The config file {recipe}, line 3: 'lora_r' must be"
    )
    assert said("--loss_type", "exo_pair").startswith("Of AMAConfig, 'label_smoothing' must lie in (0, 1)")
    parser = make_parser("ama", prog="trl ama")
    parse_dataclasses(parser, [*flags, "--config", str(recipe), "--learning_rate", "1e-4", "--lora_r", "4"])


def recipe_of(specialist_args, **values):
    tasks = [{"task": "code", "path": "x", "specialist_args": specialist_args}]
    model = ModelConfig(model_name_or_path="x", **{k: v for k, v in values.items() if k.startswith("lora")})
    training = config(**{k: v for k, v in values.items() if not k.startswith("lora")})
    return RunSettings(PipelineArguments(), training, model, TaskMixtureConfig(tasks=tasks))


@pytest.mark.parametrize(
    ("own", "recipe", "text"),
    [
        ({"learning_rate": -1}, {}, "Of the specialist_args of task 'code', 'learning_rate' must be at least 0"),
        ({"loss_type": ["robust"], "label_smoothing": 0.6}, {}, "Of the specialist_args of task 'code', 'label_smoothing' must lie in"),
        ({"loss_type": ["robust"]}, {"label_smoothing": 0.6}, "With the specialist_args of task 'code', 'label_smoothing' must lie in"),
        ({"per_device_train_batch_size": 0}, {}, "Of the specialist_args of task 'code', 'per_device_train_batch_size' must be at least 1"),
    ],
)  # fmt: skip
def test_specialist_args(own, recipe, text):
    run = recipe_of(own, **recipe).recipe
    with pytest.raises(AMAError, match=text):
        run.specialist_arguments(run.task_args.tasks[0])


@pytest.mark.parametrize("values", [{"lora_r": 0}, {"lora_alpha": 0}, {"lora_dropout": 1.0}, {"lora_dropout": NAN}])
def test_model_arguments_in_python(values):
    (name,) = values
    with pytest.raises(AMAError, match=f"Of the model's arguments, '{name}' must"):
        recipe_of({}, **values)


def test_a_loss_that_is_scored():
    with pytest.raises(AMAError, match="'beta' must be above 0"):
        PreferenceLossConfig(["sigmoid"], beta=-1.0)


# ---- All of the table ----

NUMBERS = st.one_of(
    st.floats(),
    st.integers(-(10**6), 10**6),
    st.sampled_from([0, -1, 1, 0.5, 2**32, 10**400, INF, -INF, NAN]),
)


@settings(max_examples=200)
@given(st.sampled_from(sorted(LIMITS)), NUMBERS, st.data())
def test_outside_is_refused_by_name(key, number, data):
    limit = data.draw(st.sampled_from(LIMITS[key]))
    assume(not limit.holds(number))
    with pytest.raises(LimitError, match=f"^Here, '{key}' must ") as caught:
        check_limits({**limit.given, key: number}, "Here,")
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


@settings(max_examples=200)
@given(st.sampled_from(sorted([*LIMITS, *FREE])), NUMBERS)
def test_inside_is_taken(key, number):
    assume(number == number and all(limit.holds(number) for limit in LIMITS.get(key, ())))
    assume(key != "loss_weights" or number)
    check_limits({key: number, "loss_type": ["sigmoid", "robust"], "sync_ref_model": True}, "Here,")


# Ranges within which two steps are run; the others' numbers only count things
TRAINED = {
    "beta": (1e-3, 10.0), "learning_rate": (0.0, 1e-2), "weight_decay": (0.0, 10.0), "adam_beta1": (0.0, 0.999), "adam_beta2": (0.0, 0.9999),
    "adam_epsilon": (1e-12, 1.0), "warmup_steps": (0.0, 3.0), "max_grad_norm": (-1.0, 10.0), "label_smoothing": (0.0, 0.49),
    "smoothing": (0.0, 1.0), "mixing_lr": (1e-3, 10.0), "ld_alpha": (-1.0, 2.0), "neftune_noise_alpha": (0.0, 5.0),
}  # fmt: skip


@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.fixed_dictionaries({name: st.floats(*ends) for name, ends in TRAINED.items()}),
    st.sampled_from(["sigmoid", "robust", "hinge"]),
)
def test_inside_survives_a_tiny_run(model_dir, tmp_path, values, loss_type):
    values = {**QUICK, **values, "warmup_steps": round(values["warmup_steps"])}
    args = AMAConfig(**{**values, "output_dir": str(tmp_path), "max_steps": 2}, loss_type=[loss_type], logging_steps=1)
    trainer = AMATrainer(model_dir, args=args, train_dataset=make_dataset({"list": 8, "sort": 8}), peft_config=lora())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_a_number_that_python_does_not_write_out_is_refused_in_a_sentence():
    with pytest.raises(AMAError, match="'learning_rate' .* a number of thousands of digits"):
        config(learning_rate=16**5000)
