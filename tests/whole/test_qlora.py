"""QLoRA end to end on a tiny model: one quantised base a stage, and the same numbers in every stage."""

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM, get_peft_model_state_dict
from peft.utils import set_peft_model_state_dict
from qlora_runs import LAYERS, NF4, SIZES, alive, base_fixture, finished_fixture, gradient, recipe_fixture  # noqa: F401 - fixtures
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig
from trl import DPOTrainer

from trl_ama import AMATrainer
from trl_ama.common.files import read_json
from trl_ama.dpo.pair_trainer import ScoringTrainer, SpecialistTrainer
from trl_ama.pipeline.generalists import generalist_stage
from trl_ama.pipeline.run_losses import joined_data
from trl_ama.policies.quantized import keep_weights, quantized_layers
from trl_ama.policies.switching import reference_policy, trained_policy_and_reference
from trl_ama.reference_losses.loading import load_reference_losses


# Mean difference, nats a token, between two ways to compute the same 4-bit model in bf16 (packed or padded, in other batches).
# Measured: 0.006 to 0.009, and 0.03 at most; other weights (the 16-bit base) are 0.5 away
TOKEN = 0.015


# ---- One base ----


def test_each_stage_loads_one_base_and_frees_it(finished):
    _, _, loads = finished
    assert {stage: len(before) for stage, before in loads.items()} == {
        "specialists": len(SIZES),  # one after the other
        "losses": 1,
        "train": 1,
        "eval": 1,
    }
    assert not any(sum(loads.values(), []))


def test_adapters_are_switched_on_the_one_base(finished):
    settings, _, _ = finished
    trainer = scoring_trainer(settings)
    before = {name: layer.weight.data_ptr() for name, layer in quantized_layers(trainer.model.get_base_model())}
    kept = {layer.weight.data_ptr(): layer.weight.data.clone() for _, layer in quantized_layers(trainer.model)}
    assert len(kept) == LAYERS == alive()
    source = settings.specialist_source("list")
    with trained_policy_and_reference(trainer, "the specialist of task 'list'", source) as (specialist, reference):
        assert {layer.weight.data_ptr() for _, layer in quantized_layers(specialist)} == set(kept)
        with reference() as model:
            assert model is specialist
        assert alive() == LAYERS
    after = {name: layer.weight.data_ptr() for name, layer in quantized_layers(trainer.model.get_base_model())}
    assert after == before and trainer.ref_model is None
    for _, layer in quantized_layers(trainer.model):
        assert torch.equal(layer.weight.data, kept[layer.weight.data_ptr()])


def test_it_learned(finished):
    """A random model of two layers mostly remembers its pairs, but of `brief` it learns enough for held-out ones."""
    settings, results, _ = finished
    note = read_json(settings.folder.specialist("brief") / "stage.json")["result"]
    assert note["train_loss"] < 0.2 and note["eval_loss"] < note["base_loss"] - 0.05 and note["eval_margin"] > 0.3
    by_task = {name: policy["by_task"]["brief"] for name, policy in results["policies"].items()}
    assert by_task["specialists"]["margin"] == pytest.approx(note["eval_margin"], abs=0.1)
    history = read_json(settings.folder.generalist("ama_s") / "trainer_state.json")["log_history"]
    assert len([entry for entry in history if "eval_worst_excess" in entry]) == 3
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert np.mean(losses[-2:]) < np.mean(losses[:2])


# ---- The same numbers everywhere ----


def scoring_trainer(settings, **kwargs):
    return ScoringTrainer(
        model=settings.recipe.model_name,
        args=settings.recipe.scoring_arguments(settings.inputs.has_images),
        train_dataset=settings.inputs.data["train"],
        quantization_config=settings.recipe.quantization_config(),
        peft_config=settings.inputs.peft_config(),
        **kwargs,
    )


def generalist_trainer(settings, trainer_class=AMATrainer, **changes):
    config = {"mixing": "ama_s"} if trainer_class is AMATrainer else {}
    args = settings.recipe.with_arguments(
        output_dir=str(settings.folder.path / "other"), eval_strategy="no", **config, **changes
    )
    data = joined_data(settings)["train"]
    if trainer_class is DPOTrainer:  # as `trl dpo` would
        names = [name for name in ("prompt", "chosen", "rejected") if name in data.column_names]
        data = data.select_columns(names)
    return trainer_class(
        model=settings.recipe.model_name,
        args=args,
        train_dataset=data,
        quantization_config=settings.recipe.quantization_config(),
        peft_config=settings.inputs.peft_config(),
    )


def per_token(trainer, model, data, columns):
    """How far log-probs of batches of TRL's own forward pass are from those of a dataset. # (2N,) nats a token"""
    distances = []
    for start in range(0, len(data), 8):
        rows = [trainer.train_dataset[row] for row in range(start, min(start + 8, len(data)))]
        inputs = trainer._prepare_inputs(trainer.data_collator(rows))
        inputs = {key: value for key, value in inputs.items() if key != "task" and "_logps" not in key}
        with torch.no_grad(), trainer.accelerator.autocast():
            kwargs = {key: value for key, value in inputs.items() if key != "completion_mask"}
            mask = inputs["completion_mask"]
            outputs = model(
                **kwargs, labels=kwargs["input_ids"].masked_fill(mask == 0, -100), use_cache=False, fused_lm_head=True
            )
        sums = (outputs.log_probs * mask[:, 1:]).sum(1).chunk(2)
        counts = mask.sum(1).chunk(2)
        for side, column in enumerate(columns):
            expected = torch.tensor(data[column][start : start + len(rows)])
            distances.append((sums[side].float() - expected).abs() / counts[side])
    return torch.cat(distances).numpy()


@pytest.mark.parametrize("training", [True, False])
def test_reference_losses_are_the_trainers_own_at_the_start(finished, training):
    """TRL's plain DPOTrainer, with the adapter that it starts from and without, in training mode and in evaluation."""
    settings, _, _ = finished
    data, trainer = joined_data(settings)["train"], generalist_trainer(settings, DPOTrainer)
    keep_weights(trainer.model)
    trainer.model.train(training)
    with reference_policy(trainer) as model:
        reference = per_token(trainer, model, data, ("ref_chosen_logps", "ref_rejected_logps"))
    policy = per_token(trainer, trainer.model, data, ("ref_chosen_logps", "ref_rejected_logps"))
    print(f"training={training}: mean {reference.mean():.4f}, largest {reference.max():.4f} nats a token")
    assert np.array_equal(reference, policy)  # B is zero
    assert reference.mean() < TOKEN and reference.max() < 6 * TOKEN


@pytest.mark.parametrize("task", SIZES)
def test_a_specialist_scores_as_it_was_trained(finished, task):
    """Its weights in the very trainer that made them, TRL's forward pass."""
    settings, _, _ = finished
    trainer = generalist_trainer(settings, DPOTrainer)
    keep_weights(trainer.model)
    weights = load_file(settings.folder.specialist(task) / "adapter_model.safetensors")
    set_peft_model_state_dict(trainer.model, weights)
    joined = joined_data(settings)["train"]
    number = settings.recipe.task_names.index(task)
    rows = [row for row, label in enumerate(joined["task"]) if label == number]
    trainer.train_dataset = trainer.train_dataset.select(rows)
    columns = ("specialist_chosen_logps", "specialist_rejected_logps")
    distance = per_token(trainer, trainer.model, joined.select(rows), columns)
    print(f"{task}: mean {distance.mean():.4f}, largest {distance.max():.4f} nats a token")
    assert distance.mean() < TOKEN and distance.max() < 6 * TOKEN


def test_the_adapter_computes_in_the_type_of_its_training(finished):
    settings, _, _ = finished
    trainer = scoring_trainer(settings)
    with trained_policy_and_reference(trainer, "it", settings.specialist_source("list")) as (specialist, _):
        types = {value.dtype for name, value in specialist.named_parameters() if "lora_" in name}
    assert types == {torch.bfloat16}


def test_every_stage_prepares_the_base_alike(finished):
    """TRL casts no norm, embedding or head of a quantised base, and neither do we: otherwise log-probs would drift."""
    settings, _, _ = finished
    found = {}
    data = settings.inputs.pairs_of("list", "train").remove_columns("task")
    args = settings.recipe.with_arguments(output_dir=str(settings.folder.path / "other"), eval_strategy="no")
    quantization, peft_config = settings.recipe.quantization_config(), settings.inputs.peft_config()
    for name, trainer in (
        ("specialist", lambda: SpecialistTrainer(
            settings.recipe.model_name, args=args, train_dataset=data, quantization_config=quantization, peft_config=peft_config
        )),
        ("scoring", lambda: scoring_trainer(settings)),
        ("generalist", lambda: generalist_trainer(settings)),
        ("trl", lambda: generalist_trainer(settings, DPOTrainer)),
    ):  # fmt: skip
        model = trainer().model
        found[name] = {key: value.dtype for key, value in model.named_parameters()}
        trained = {key for key, value in model.named_parameters() if value.requires_grad}
        assert trained == {key for key in found[name] if ".lora_" in key}
        kinds = {"quantised": torch.uint8, "": torch.bfloat16}
        assert set(found[name].values()) == set(kinds.values())
    assert all(types == found["trl"] for types in found.values())


def test_checkpointing_lets_gradients_through_to_the_first_layer(finished):
    settings, _, _ = finished
    trainer = generalist_trainer(settings, DPOTrainer)
    assert trainer.args.gradient_checkpointing
    trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)  # as its `train` does
    inputs = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[row] for row in range(4)]))
    trainer.model.train()
    trainer.compute_loss(trainer.model, inputs).backward()
    first = trainer.model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight
    assert first.grad.abs().max() > 0


def test_every_trainer_of_ours_keeps_the_weights(finished):
    settings, _, _ = finished
    for trainer in (scoring_trainer(settings), generalist_trainer(settings)):
        before = gradient(trainer.model)
        trainer.model.eval()
        with torch.no_grad():
            trainer.model(torch.arange(5, 25)[None])
        assert torch.equal(before, gradient(trainer.model))


# ---- Files ----


def test_adapters_are_saved_without_the_base(finished):
    settings, _, _ = finished
    for folder in (settings.folder.generalist("ama_s"), settings.folder.specialist("list")):
        weights = load_file(folder / "adapter_model.safetensors")
        assert len(weights) == 2 * LAYERS and all("lora_" in name for name in weights)
        numbers = sum(value.numel() for value in weights.values())
        size = (folder / "adapter_model.safetensors").stat().st_size
        assert 2 * numbers <= size < 2 * numbers + 200 * len(weights)  # bf16, and the names
        assert not list(folder.glob("model*.safetensors")) and not list(folder.glob("*.bin.index*"))


@pytest.mark.parametrize("bits", [4, 16])
def test_a_generalist_is_read_again(finished, bits):
    settings, _, _ = finished
    folder = settings.folder.generalist("ama_s")
    kwargs = {"quantization_config": NF4} if bits == 4 else {}
    model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **kwargs)
    keep_weights(model)
    assert len(list(quantized_layers(model))) == (LAYERS if bits == 4 else 0)
    saved = load_file(folder / "adapter_model.safetensors")
    read = get_peft_model_state_dict(model)
    assert set(read) == set(saved) and all(
        torch.equal(read[name].to(saved[name].dtype), saved[name]) for name in saved
    )
    model.eval()
    with torch.no_grad():
        on = model(torch.arange(5, 25)[None]).logits.float()
        with model.disable_adapter():
            off = model(torch.arange(5, 25)[None]).logits.float()
    assert (on - off).abs().mean() > 1e-3


def test_cards_say_how_to_load_what_was_trained(finished):
    settings, _, _ = finished
    for folder in (settings.folder.generalist("ama_s"), settings.folder.specialist("list")):
        card = (folder / "README.md").read_text()
        (line,) = [line for line in card.splitlines() if line.startswith("quantization = ")]
        shown = eval(line.partition(" = ")[2], {"BitsAndBytesConfig": BitsAndBytesConfig})
        assert shown.to_dict() == settings.recipe.quantization_config().to_dict() == NF4.to_dict()
        assert "trl ama-merge --adapter path/to/this/folder" in card and "merge_and_unload" not in card


def test_fingerprints_name_the_quantisation(finished):
    settings, _, _ = finished
    assert "nf4" in load_reference_losses(str(settings.folder.losses)).fingerprints["list"]["quantization"]
    assert generalist_stage(settings, "ama_s").fingerprint["load_in_4bit"] is True
