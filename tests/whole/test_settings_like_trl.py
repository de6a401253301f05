"""`prefix_sharing="auto"` gives DPOTrainer's numbers: with every setting of `corpus_settings.py`, and every kind of adapter that
PEFT has, whether the fast path is taken or not."""

import contextlib
import importlib.util

import pytest
import torch
from corpus_settings import ADAPTERS, SETTINGS, Setting, other_adapter_kinds, trainer_of
from tiny_models import make_model, save
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer

from trl_ama import AMAConfig, AMATrainer
from trl_ama.dpo.pair_trainer import SpecialistTrainer


pytestmark = pytest.mark.slow


WRITE_INTO_THE_BASE = ("pissa", "olora")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(PrinterCallback, "on_log", lambda *args, **kwargs: None)
    with torch.compiler.set_stance("force_eager"):  # a compiled model is another object, and that is enough
        yield


@pytest.fixture(scope="module")
def make(tokenizer, tmp_path_factory):
    """Makes trainers, all that have the same model from the same folder."""
    folder, models = tmp_path_factory.mktemp("settings"), {}

    def model_of(setting: Setting) -> str:
        key = repr(sorted(setting.model.items()))
        if key not in models:
            models[key] = str(folder / f"model-{len(models)}")
            save(make_model(len(tokenizer), **setting.model), tokenizer, models[key])
        return models[key]

    def make(trainer_class, setting: Setting, **args):
        ours = {"mixing": "proportional", "task": "list"} if trainer_class is AMATrainer else {}
        config = AMAConfig if trainer_class is AMATrainer else DPOConfig
        torch.manual_seed(0)
        return trainer_of(
            trainer_class, config, setting, model_of(setting), tokenizer, str(folder / "run"), **ours, **args
        )

    return make


def trained(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().float().clone() for name, value in model.named_parameters() if value.requires_grad}


def distance(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys() and left
    return sum(float((left[name] - right[name]).square().sum()) for name in left) ** 0.5


def rounding(setting: Setting) -> tuple[float, float]:
    """What losses may differ by, and weights as a share of how far they moved. Adam makes steps of gradients that are rounding."""
    is_16_bit = setting.args.get("bf16") or "dtype" in setting.args.get("model_init_kwargs", {})
    return (2e-2, 0.3) if is_16_bit else (5e-4, 5e-4)


def assert_path(trainer, expected: str | None, steps: int) -> None:
    taken = trainer.prefix_sharing.taken
    if expected == "fast":
        assert taken["plain"] == 0 and taken["fast"] >= steps
    elif expected == "plain":
        assert taken["plain"] >= steps  # a reference model of its own may take the fast one


@pytest.mark.parametrize("name", [name for name in SETTINGS if not name.startswith("adapter ")])
def test_a_run_is_the_run_of_dpo_trainer(make, name):
    setting = SETTINGS[name]
    if setting.needs and importlib.util.find_spec(setting.needs) is None:
        pytest.skip(f"{setting.needs} is not installed")
    start, ends, losses = None, [], []
    for trainer_class in (DPOTrainer, AMATrainer):
        trainer = make(trainer_class, setting)
        start = trained(trainer.model)
        torch.manual_seed(1)
        trainer.train()
        ends.append(trained(trainer.model))
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert_path(trainer, setting.path, trainer.state.global_step)
    assert len(losses[0]) >= 2
    of_loss, of_weights = rounding(setting)
    assert losses[1] == pytest.approx(losses[0], abs=of_loss * max(1.0, *losses[0]))
    moved = distance(ends[0], start)
    assert moved > 0.1  # there is something to be the same
    assert distance(*ends) < of_weights * moved


def gradients_of(loss: torch.Tensor, model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {
        name: torch.zeros_like(value) if value.grad is None else value.grad.clone()
        for name, value in model.named_parameters()
        if value.requires_grad
    }


@pytest.mark.parametrize("name", [*ADAPTERS, *(f"kind {kind}" for kind in other_adapter_kinds())])
def test_losses_and_gradients_of_every_kind_of_adapter(make, name):
    """On one trainer, whose `DPOTrainer` part is asked for the same: when the adapter is new, and after a step."""
    setting = SETTINGS.get(f"adapter {name}") or Setting({}, (name.removeprefix("kind "), {}), path=None)
    try:
        trainer = make(SpecialistTrainer, setting)
    except Exception:
        if name in ADAPTERS:
            raise
        with pytest.raises(Exception) as theirs:  # refused by PEFT or TRL, not by us
            make(DPOTrainer, setting)
        pytest.skip(f"PEFT or TRL does not make it: {theirs.value}")
    model = trainer.model.train()
    generator = torch.Generator().manual_seed(0)
    for step, rows in enumerate(([0, 1, 2, 3], [4, 5, 6])):
        batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[row] for row in rows]))
        if (
            name in WRITE_INTO_THE_BASE
        ):  # DPOTrainer's own reference is what they left of it; `test_true_base.py` has ours
            batch = trainer.with_reference(batch)
        results = []
        for compute in (DPOTrainer.compute_loss, SpecialistTrainer.compute_loss):
            torch.manual_seed(step)
            try:
                with trainer.reference_from_inputs() if "ref_chosen_logps" in batch else contextlib.nullcontext():
                    loss = compute(trainer, model, dict(batch))
            except Exception as error:
                if compute is not DPOTrainer.compute_loss:
                    raise
                assert name not in ADAPTERS, error
                pytest.skip(f"DPOTrainer does not train it: {error}")
            results.append((loss.item(), gradients_of(loss, model)))
        (theirs, expected), (ours, found) = results
        assert ours == pytest.approx(theirs, abs=1e-5)
        size = distance(expected, {name: torch.zeros_like(value) for name, value in expected.items()})
        assert size > 0
        assert distance(found, expected) < 1e-4 * size
        with torch.no_grad():
            for parameter in (value for value in model.parameters() if value.requires_grad):
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    assert_path(trainer, setting.path, 2)
