"""QLoRA end to end on a tiny model: one quantised base a stage, the same numbers in every stage, and what is refused."""

import gc
import importlib.util
import json

import numpy as np
import pytest
import torch
import trl.trainer.dpo_trainer
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from tiny_models import make_model, save
from tiny_pairs import make_rows
from tiny_runs import QUICK
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import DPOConfig, DPOTrainer, ModelConfig, TrlParser

from trl_ama import AMAConfig, AMAError, AMATrainer, TaskMixtureConfig, cli, run_pipeline
from trl_ama.generalists import generalist_stage
from trl_ama.loss_loading import load_reference_losses
from trl_ama.merging import merge_adapter
from trl_ama.pipeline_arguments import PipelineArguments
from trl_ama.policies import reference_policy, trained_policy_and_reference
from trl_ama.prefix_trainer import ScoringTrainer, SpecialistTrainer
from trl_ama.quantized import check_optimizer, dequantized_weight, keep_weights, quantized_layers
from trl_ama.run_losses import joined_data
from trl_ama.run_settings import RunSettings
from trl_ama.run_start import check_recipe
from trl_ama.safe_files import read_json, write_json


pytest.importorskip("bitsandbytes")
from bitsandbytes.functional import has_avx512bf16  # noqa: E402


NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
SIZES = {"list": 64, "brief": 64}
LAYERS = 14  # of the tiny model that are quantised: seven in each of two
# Mean difference, nats a token, between two ways to compute the same 4-bit model in bf16 (packed or padded, in other batches).
# Measured: 0.006 to 0.009, and 0.03 at most; other weights (the 16-bit base) are 0.5 away
TOKEN = 0.015


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    """bitsandbytes quantises blocks of 64 weights, and on a CPU wants every row to be a whole number of them."""
    path = tmp_path_factory.mktemp("base")
    return save(
        make_model(len(tokenizer), hidden_size=64, intermediate_size=128, num_key_value_heads=4), tokenizer, path
    )


@pytest.fixture(scope="module")
def recipe(base, tmp_path_factory):
    """Flags of a recipe on disk, and the parsed arguments."""
    folder = tmp_path_factory.mktemp("recipe")
    for task, count in SIZES.items():
        for split, size, seed in (("train", count, 0), ("test", 20, 1)):
            lines = [json.dumps(row) + "\n" for row in make_rows(task, size, seed)]
            (folder / f"{task}_{split}.jsonl").write_text("".join(lines))
    settings = {
        **QUICK,
        "model_name_or_path": base,
        "tasks": [{"task": task, "path": "org/data", "eval_split": "test"} for task in SIZES],
        "tasks_dir": str(folder),
        "mixing": "ama_s",
        "use_peft": True,
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "lora_target_modules": "all-linear",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "use_bnb_nested_quant": True,
        "dtype": "bfloat16",
        "bf16": True,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "optim": "paged_adamw_8bit",
        "learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
        "max_steps": 6,
        "specialist_args": {"max_steps": 24},
        "eval_strategy": "steps",
        "eval_steps": 2,
        "logging_steps": 1,
        "seed": 3,
    }
    write_json(folder / "config.yaml", settings)

    def parse(output_dir, *flags):
        parser = TrlParser((PipelineArguments, AMAConfig, ModelConfig, TaskMixtureConfig))
        argv = ["--config", str(folder / "config.yaml"), "--output_dir", str(output_dir), *map(str, flags)]
        return parser.parse_args_and_config(argv)

    parse.config = str(folder / "config.yaml")
    return parse


class Loads:
    """Every base that DPOTrainer loads, and how many quantised weights were alive just before."""

    def __init__(self, load):
        self.load, self.before = load, []

    def __call__(self, *args, **kwargs):
        self.before.append(alive())
        return self.load(*args, **kwargs)


def alive() -> int:
    """Quantised weights in memory, by their storage."""
    gc.collect()
    found = [one for one in gc.get_objects() if type(one).__name__ == "Params4bit" and one.device.type != "meta"]
    return len({one.data_ptr() for one in found})


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    """A finished run, its settings and the loads of each stage."""
    output_dir, loads = tmp_path_factory.mktemp("run"), {}
    with pytest.MonkeyPatch.context() as patch:
        for stage in ("specialists", "losses", "train", "eval"):
            loads[stage] = Loads(trl.trainer.utils.create_model_from_path)
            patch.setattr(trl.trainer.dpo_trainer, "create_model_from_path", loads[stage])
            results = run_pipeline(*recipe(output_dir), stages=(stage,))
    return RunSettings(*recipe(output_dir)), results, {stage: load.before for stage, load in loads.items()}


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
        args=settings.scoring_arguments(),
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


# ---- bitsandbytes' packing on a CPU ----


def gradient(model):
    model.train()
    model.zero_grad()
    ids = torch.arange(5, 25)[None]
    model(ids, labels=ids).loss.backward()
    return torch.cat([one.grad.float().flatten() for one in model.parameters() if one.grad is not None])


def adapted(base):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear")
    return get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, quantization_config=NF4, dtype=torch.bfloat16), config
    )


@pytest.mark.parametrize("kept", [True, False])
def test_evaluation_leaves_the_weights_as_they_were_trained(base, kept):
    """Without us bitsandbytes packs them, and no gradient passes any more; this fails when it has mended that."""
    if not kept and not has_avx512bf16():
        pytest.skip("bitsandbytes packs only where the CPU knows AVX512-BF16")
    model = adapted(base)
    if kept:
        keep_weights(model)
    before = gradient(model)
    weights = [dequantized_weight(layer).clone() for _, layer in quantized_layers(model)]
    model.eval()
    with torch.no_grad():
        model(torch.arange(5, 25)[None])
    after = gradient(model)
    same = [
        torch.equal(dequantized_weight(layer), one)
        for (_, layer), one in zip(quantized_layers(model), weights, strict=True)
    ]
    if kept:
        assert torch.equal(before, after) and all(same)
        return
    assert after.norm() < 0.5 * before.norm() and not any(same)
    with pytest.raises(AMAError, match="packed its weights.*Load it again"):
        keep_weights(model)


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


# ---- Merging ----


def log_probs(model):
    ids = torch.arange(3, 26)[None]
    model.eval()
    with torch.no_grad():
        return model(ids).logits.float().log_softmax(-1)


@pytest.fixture(scope="module")
def merged(finished, recipe, tmp_path_factory):
    """The generalist merged by the command, into what it was trained on and into the base as it is saved."""
    settings, _, _ = finished
    folders = {}
    for into in ("dequantized", "base"):
        folders[into] = tmp_path_factory.mktemp("merged") / into
        argv = ["--config", recipe.config, "--output_dir", str(settings.folder.path), "--output", str(folders[into])]
        assert cli.main(["ama-merge", *argv, *(() if into == "dequantized" else ("--into", into))]) == 0
    return folders


def test_a_merge_is_a_whole_checkpoint(merged, base):
    folder = merged["dequantized"]
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "README.md",
        "ama_merge.json",
    }  # fmt: skip
    assert not [name for name in names if "adapter" in name or name.startswith(".")]
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32 and not list(quantized_layers(model))  # the base checkpoint's
    card = (folder / "README.md").read_text()
    assert "NF4 with double quantisation" in card and "the dequantised base" in card and base not in card
    assert "the base as it is saved" in (merged["base"] / "README.md").read_text()
    assert "not exactly the model that was trained" in (merged["base"] / "README.md").read_text()


def test_the_dequantised_merge_holds_the_weights_of_the_training(finished, merged, base):
    settings, _, _ = finished
    quantized = AutoModelForCausalLM.from_pretrained(base, quantization_config=NF4, dtype=torch.bfloat16)
    adapter = load_file(settings.folder.generalist("ama_s") / "adapter_model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(merged["dequantized"])
    layers = dict(quantized_layers(quantized))
    assert len(layers) == LAYERS
    for name, layer in layers.items():
        a, b = (adapter[f"base_model.model.{name}.lora_{side}.weight"].float() for side in "AB")
        expected = dequantized_weight(layer).float() + 8 / 4 * b @ a
        torch.testing.assert_close(model.get_submodule(name).weight, expected, rtol=0, atol=1e-6)
    for name, value in quantized.named_parameters():
        if "norm" in name or "embed" in name:
            assert torch.equal(model.get_parameter(name), value.float())


def test_what_each_merge_loses(finished, merged, base, tmp_path):
    """The dequantised merge is the trained model; the 16-bit base is another one; 4 bits round the adapter away."""
    settings, _, _ = finished
    folder = settings.folder.generalist("ama_s")
    trained = AutoPeftModelForCausalLM.from_pretrained(folder, quantization_config=NF4, dtype=torch.bfloat16)
    keep_weights(trained)
    expected = log_probs(trained)
    with trained.disable_adapter():
        effect = (log_probs(trained) - expected).abs().mean()
    distance = {}
    for into, path in merged.items():
        distance[into] = (log_probs(AutoModelForCausalLM.from_pretrained(path)) - expected).abs().mean()
    four = AutoPeftModelForCausalLM.from_pretrained(folder, quantization_config=NF4, dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="rounding errors"):
        four = four.merge_and_unload()
    distance["4 bits"] = (log_probs(four) - expected).abs().mean()
    merge_adapter(str(folder), tmp_path / "half", save_dtype="bfloat16")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert half.dtype == torch.bfloat16
    distance["dequantised, bf16"] = (log_probs(half) - expected).abs().mean()
    print({"adapter's effect": float(effect), **{name: float(value) for name, value in distance.items()}})
    assert distance["dequantized"] < 0.25 * min(distance["base"], distance["4 bits"])
    assert distance["dequantised, bf16"] < 0.5 * min(distance["base"], distance["4 bits"])


# ---- Refused before anything is trained ----


@pytest.fixture
def nothing_trained(monkeypatch):
    monkeypatch.setattr(DPOTrainer, "__init__", lambda *args, **kwargs: pytest.fail("a model was loaded"))


def without(monkeypatch, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest)
    )


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--use_peft", "false"], "load_in_4bit is set without use_peft.*use_peft: true"),
        (["--dtype", "auto"], "quantisation do not go together.*set dtype to bfloat16"),
        (["--load_in_8bit", "true"], "both load in 8 bit and 4 bit|go together|8 ?bit"),
    ],
)
def test_settings_that_cannot_work(recipe, tmp_path, nothing_trained, flags, text):
    with pytest.raises((AMAError, ValueError), match=text) as caught:
        run_pipeline(*recipe(tmp_path, *flags))
    assert "\n" not in str(caught.value).strip()


def test_bitsandbytes_is_missing(recipe, tmp_path, monkeypatch, nothing_trained):
    arguments = recipe(tmp_path)
    without(monkeypatch, "bitsandbytes")
    with pytest.raises(AMAError, match=r"load_in_4bit needs bitsandbytes.*trl-ama\[quantization\]"):
        run_pipeline(*arguments)
    arguments = recipe(tmp_path, "--load_in_4bit", "false")
    with pytest.raises(AMAError, match="optim is 'paged_adamw_8bit', which needs bitsandbytes.*adamw_torch"):
        run_pipeline(*arguments)


def test_a_specialists_own_optimizer_is_tried_too(recipe, tmp_path, monkeypatch, nothing_trained):
    arguments = recipe(
        tmp_path, "--optim", "adamw_torch", "--load_in_4bit", "false", "--specialist_args", "{optim: lion_8bit}"
    )
    without(monkeypatch, "bitsandbytes")
    with pytest.raises(AMAError, match="optim is 'lion_8bit'"):
        run_pipeline(*arguments)


def test_an_optimizer_that_does_not_run_here(recipe, tmp_path, monkeypatch, nothing_trained):
    import bitsandbytes

    def step(*args, **kwargs):
        raise NotImplementedError("no kernel\nfor this device")

    monkeypatch.setattr(bitsandbytes.optim.AdamW, "step", step)
    with pytest.raises(
        AMAError, match=r"'paged_adamw_8bit', which does not run on this machine's cpu \(NotImp.*no kernel\)"
    ):
        check_recipe(RunSettings(*recipe(tmp_path)))


OPTIMIZERS = [
    "adamw_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "lion_8bit",
    "paged_lion_8bit",
    "ademamix_8bit",
    "rmsprop_bnb_8bit",
]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_of_bitsandbytes_run_on_a_cpu_and_a_warning_says_what_for(tmp_path, monkeypatch, name):
    said = []
    monkeypatch.setattr("trl_ama.quantized.logger.warning", said.append)
    check_optimizer(DPOConfig(str(tmp_path), use_cpu=True, bf16=False, optim=name))
    assert len(said) == 1 and name in said[0] and "adamw_torch" in said[0]


def test_other_optimizers_are_not_tried(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_ama.quantized.Trainer", None)
    for name in ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd"):
        check_optimizer(DPOConfig(str(tmp_path), use_cpu=True, bf16=False, optim=name))
