"""What a run will need: counted without weights, equal to what is there when there are weights."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from kept_traces import kept_traces_fixture  # noqa: F401 - fixture
from peft import LoraConfig, get_peft_model
from places import DOCS
from tiny_models import make_config, make_model
from tiny_pairs import make_rows
from transformers import BitsAndBytesConfig, LlamaConfig, MambaConfig, MistralConfig, Qwen3Config

from trl_ama import cli
from trl_ama.plan import bytes as optimizer_memory
from trl_ama.plan import memory as plan_memory
from trl_ama.plan.empty_model import MemorySettings, base_model, empty_model
from trl_ama.plan.lengths import Lengths, common_beginning, largest_batch, scoring_batch
from trl_ama.plan.memory import GIB, scoring_memory, training_memory
from trl_ama.policies.quantized import quantized_layers


LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
PAIRS = [(12, 8, 6), (10, 9, 7)]
TINY = make_config(64)
# With 4 of the 32 layers: the others are like them, and take a second each
SEVEN_BILLION = dict(
    hidden_size=4096, num_hidden_layers=4, num_attention_heads=32, num_key_value_heads=8, head_dim=128
)


pytestmark = pytest.mark.usefixtures("restored_environment", "kept_traces")


def kept(settings: MemorySettings, pairs: list, packed: bool = True, common: int = 0) -> int:
    """What the backward pass finds; at the peak, a tiny model is small beside a tile of TRL's head."""
    return plan_memory.trace_pass(empty_model(TINY, settings), settings, pairs, packed, True, common).kept


# ---- Terms ----


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_and_weights_are_those_of_a_real_model(tied):
    real = make_model(64, tie_word_embeddings=tied)
    empty = empty_model(real.config, MemorySettings())
    assert optimizer_memory.count_parameters(empty) == (real.num_parameters(), real.num_parameters())
    own = {parameter.data_ptr(): parameter.nbytes for parameter in real.parameters()}
    assert abs(optimizer_memory.weight_bytes(empty) - sum(own.values())) < 200  # rotary tables
    wrapped, planned = get_peft_model(real, LORA), empty_model(real.config, MemorySettings(peft_config=LORA))
    trainable, total = wrapped.get_nb_trainable_parameters()
    assert optimizer_memory.count_parameters(planned) == (total, trainable)


def test_an_adapters_file_has_the_planned_size(tmp_path):
    wrapped = get_peft_model(make_model(64), LORA)
    wrapped.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    planned = empty_model(make_model(64).config, MemorySettings(peft_config=LORA))
    assert optimizer_memory.saved_bytes(planned) == file.stat().st_size - header


@pytest.mark.parametrize("double_quant", [True, False])
def test_nf4_bytes_are_those_of_bitsandbytes(double_quant):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(96, 160)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=double_quant)
    held = [packed, state.absmax, state.code]
    if double_quant:
        held += [state.offset, state.state2.absmax, state.state2.code]
    assert optimizer_memory.nf4_bytes(weight.numel(), double_quant) == sum(tensor.nbytes for tensor in held)


def test_a_quantised_model_is_planned_as_it_is_loaded():
    pytest.importorskip("bitsandbytes")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    settings = MemorySettings(dtype=torch.bfloat16, quantization=quantization, peft_config=LORA)
    model = empty_model(TINY, settings)
    linear = [layer for _, layer in quantized_layers(model)]
    assert len(linear) == 14 and type(base_model(model).lm_head) is torch.nn.Linear
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.bfloat16}
    scaled = empty_model(TINY, replace(settings, autocast=torch.float16))  # fp16 needs adapters in 32 bits
    assert {parameter.dtype for parameter in scaled.parameters() if parameter.requires_grad} == {torch.float32}
    plain = replace(settings, quantization=None)
    assert optimizer_memory.weight_bytes(model) < optimizer_memory.weight_bytes(empty_model(TINY, plain))
    # 8 bits keep a layer's input; an adapter on the same layer does that anyway
    four = replace(settings, peft_config=LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    eight = replace(four, quantization=BitsAndBytesConfig(load_in_8bit=True))
    assert kept(four, PAIRS) < kept(eight, PAIRS)
    assert training_memory(TINY, settings, PAIRS).packed


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "adagrad", "rmsprop"])
def test_optimizer_states_are_those_of_the_optimizer(optim, quick_args):
    from transformers import Trainer

    model = make_model(64)
    trainer = Trainer(model, quick_args(optim=optim))
    optimizer = trainer.create_optimizer()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    held = sum(value.nbytes for value in states if torch.is_tensor(value) and value.dim())
    assert optimizer_memory.optimizer_bytes(model.parameters(), optim) == held


def test_8_bit_and_paged_states():
    parameters = [torch.empty(128, 64, device="meta"), torch.empty(64, device="meta")]
    assert optimizer_memory.optimizer_bytes(parameters, "adamw_bnb_8bit") == 2 * (8192 + 4 * 32) + 2 * 64 * 4
    assert optimizer_memory.optimizer_bytes(parameters, "lion_32bit") == 4 * (8192 + 64)
    assert optimizer_memory.is_paged("paged_adamw_8bit") and not optimizer_memory.is_paged("adamw_8bit")
    assert optimizer_memory.optimizer_family("galore_adamw") is None


# ---- A pass ----


def test_what_is_counted_on_a_real_model_is_what_is_planned():
    """The same program on tensors with contents makes as many bytes, at the worst moment and after the forward pass."""
    from trl.trainer.utils import add_fused_lm_head

    from trl_ama.fast_path.forward import packed_forward
    from trl_ama.plan.trace import LiveBytes, packed_row, trace_pass

    settings = MemorySettings(peft_config=LORA, device="cpu")
    planned = trace_pass(empty_model(TINY, settings), settings, PAIRS, packed=True, trains=True)
    model = make_model(64)
    add_fused_lm_head(model)
    model = get_peft_model(model, LORA).train()
    row = packed_row(PAIRS)
    with LiveBytes() as live:
        live.ignore(model.parameters())
        outputs = packed_forward(model, row, use_cache=False)
        kept = live.now
        outputs.log_probs.sum().backward()
    assert live.peak == pytest.approx(planned.peak, rel=0.02)
    assert kept == pytest.approx(planned.kept, rel=0.02)


def test_a_planned_row_is_the_row_that_is_packed():
    """Of pairs of these lengths, common beginning included; also the plan's count of its tokens."""
    from trl_ama.fast_path.packing import pack_pairs
    from trl_ama.plan.trace import packed_row

    sizes, common = [(14, 5, 3), (17, 2, 6), (12, 4, 4)], 10
    longest = max(prompt + max(chosen, rejected) for prompt, chosen, rejected in sizes)
    ids = torch.zeros(6, longest, dtype=torch.long)
    mask, scored = torch.zeros_like(ids), torch.zeros_like(ids)
    for number, (prompt, *answers) in enumerate(sizes):
        for row, answer in zip((number, number + 3), answers, strict=True):
            whole = torch.full((prompt + answer,), 20 + row)  # answers differ from their first token on
            whole[:prompt] = 10 + number
            whole[:common] = 5
            ids[row, : prompt + answer], mask[row, : prompt + answer] = whole, 1
            scored[row, prompt : prompt + answer] = 1
    real, planned = pack_pairs(ids, mask, scored.bool()), packed_row(sizes, common)
    assert (real.common, real.lengths, real.longest) == (planned.common, planned.lengths, planned.longest)
    for name in ("input_ids", "position_ids", "labels", "score_positions", "slots", "scored"):
        assert getattr(real, name).shape == getattr(planned, name).shape
    memory = training_memory(TINY, MemorySettings(), sizes, common=common)
    assert memory.tokens == real.input_ids.shape[1] and memory.common == common


def test_what_saves_memory_saves_it():
    pairs = [(60, 60, 50)] * 4
    settings = MemorySettings(peft_config=LORA, dtype=torch.bfloat16, autocast=torch.bfloat16)
    packed = kept(settings, pairs)
    assert kept(settings, pairs, packed=False) > packed
    assert kept(replace(settings, gradient_checkpointing=True), pairs) < packed / 2
    assert kept(settings, pairs, common=40) < packed
    # No fused kernel keeps scores; in 32 bits there is one that keeps keys for every head, and sums of every sequence alike
    assert packed == kept(replace(settings, attention="flash_attention_2"), pairs)
    single = replace(settings, dtype=torch.float32, autocast=None)
    flash = kept(replace(single, attention="flash_attention_2"), pairs)
    scores = (
        4 * (4 * 2 * 4) * (49 * 109)
    )  # bytes, times heads, layers and pairs, times queries and keys of a rejected branch
    assert 0 < kept(single, pairs) - flash < scores / 2
    assert kept(replace(settings, attention="eager"), pairs, False) > kept(settings, pairs, False)
    assert scoring_memory(TINY, settings, pairs).peak < training_memory(TINY, settings, pairs).peak
    full = training_memory(TINY, replace(settings, peft_config=None), pairs, reference=True)
    assert full.gradients == full.weights - 32 == full.reference - 32  # rotary frequencies
    assert full.peak >= full.weights + full.reference + full.optimizer + full.gradients


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SEVEN_BILLION, vocab_size=32000, intermediate_size=11008),
        MistralConfig(**SEVEN_BILLION, vocab_size=32000, intermediate_size=14336, sliding_window=None),
        Qwen3Config(**SEVEN_BILLION, vocab_size=151936, intermediate_size=12288),
    ],
    ids=lambda config: config.model_type,
)
def test_seven_billion_parameters_from_a_configuration(config):
    settings = MemorySettings(
        dtype=torch.bfloat16, autocast=torch.bfloat16, peft_config=LORA, gradient_checkpointing=True
    )
    memory = training_memory(config, settings, [(500, 500, 400)])
    assert memory.packed and memory.activations > 0
    assert memory.weights == pytest.approx(2 * memory.parameters, rel=0.02)
    assert memory.peak < 8 * GIB and memory.fits(12)


def test_a_model_without_plain_attention_takes_the_plain_path():
    config = MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    memory = scoring_memory(config, MemorySettings(device="cpu"), PAIRS)
    assert not memory.packed and memory.why_plain


# ---- Lengths ----


def test_lengths_are_cut_and_the_largest_come_first():
    whole = Lengths(np.array([[4, 10, 2], [9, 1, 1], [2, 3, 3]]), 30)
    part = whole.cut(8)
    assert part.pairs.tolist() == [[4, 4, 2], [2, 3, 3]] and part.count == 20
    assert whole.cut(None) is whole
    # From the other end, each answer's sequence by itself: nothing is left that both begin with
    assert whole.cut(8, "keep_end").pairs.tolist() == [[0, 8, 6], [0, 8, 8], [2, 3, 3]]
    assert largest_batch([part], 1) == [(4, 4, 2)] and largest_batch([part], 5) == [(4, 4, 2), (2, 3, 3)]
    wide = Lengths(np.array([[1, 9, 1], [5, 4, 4]]), 2)
    assert largest_batch([wide], 1, packed=True) == [(5, 4, 4)] and largest_batch([wide], 1, packed=False) == [
        (1, 9, 1)
    ]
    assert part.padded_mean(2) == 8 and part.packed.tolist() == [10, 8]
    assumed = Lengths(np.array([[4, 4, 4]]), None, assumed=True)
    assert largest_batch([assumed], 3) == [(4, 4, 4)] * 3
    assert assumed.cut(6).pairs.tolist() == [[3, 3, 3]]


def test_common_beginning_of_tasks():
    lengths = [Lengths(np.array([[20, 3, 3]]), 1, tuple(range(size)) + (90,)) for size in (12, 10)]
    assert common_beginning(lengths[:1]) == 13 and common_beginning(lengths) == 10
    assert common_beginning([Lengths(np.array([[20, 3, 3]]), 1, (1, 2, 3))]) == 0  # not worth a mask


@pytest.mark.parametrize("mode", ["auto", False])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_a_sweep_begins_with_the_planned_batch(mode, size):
    """The planned batch is the one that scoring takes first, on either path."""
    from accelerate import Accelerator
    from datasets import Dataset

    from trl_ama.dpo.sweep import Sweep

    sizes = np.random.default_rng(0).integers(1, 30, size=(60, 3))
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = Dataset.from_list([{name: [0] * count for name, count in zip(names, row, strict=True)} for row in sizes])
    args = SimpleNamespace(max_length=None, precompute_ref_batch_size=size, per_device_eval_batch_size=None)
    trainer = SimpleNamespace(
        args=args, data_collator=None, prefix_sharing=SimpleNamespace(mode=mode), accelerator=Accelerator(cpu=True)
    )
    first = next(Sweep(trainer, {}, rows).batches())
    planned = scoring_batch([Lengths(sizes[:20], 20), Lengths(sizes[20:], 40)], size, packed=mode == "auto")
    longest = [prompt + max(answers) for prompt, *answers in (sizes[row] for row in first)]
    assert [prompt + max(answers) for prompt, *answers in planned] == longest
    assert len(planned) == len(first) and sum(map(sum, planned)) == sizes[first].sum()


# ---- The command ----


def change_config(tmp_path: Path, **changes) -> None:
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))


@pytest.fixture
def recipe(model_dir, tmp_path):
    """Flags of a tiny recipe whose model has no weights, and one layer, with an adapter on one of its matrices."""
    model = tmp_path / "model"
    shutil.copytree(model_dir, model)
    (model / "model.safetensors").unlink()
    change_config(tmp_path, num_hidden_layers=1)
    for task in ("list", "sort"):
        for split, count in (("train", 20), ("test", 4)):
            rows = "\n".join(map(json.dumps, make_rows(task, count, seed=1)))
            (tmp_path / f"{task}_{split}.jsonl").write_text(rows)
    lines = [
        f"model_name_or_path: {model}",
        "use_peft: true",
        "lora_target_modules: .*q_proj",
        "tasks: [{task: list}, {task: sort}]",
        f"tasks_dir: {tmp_path}",
        f"output_dir: {tmp_path / 'out'}",
        "max_length: 64",
        "per_device_train_batch_size: 4",
        "num_train_epochs: 2",
        "compare: [uniform]",
        "gradient_checkpointing: false",
    ]
    path = tmp_path / "recipe.yaml"
    path.write_text("\n".join(lines))
    return ["ama-plan", "--config", str(path), "--json", str(tmp_path / "plan.json")]


def plan_of(argv: list[str]) -> dict:
    assert cli.main(argv) == 0
    return json.loads(Path(argv[argv.index("--json") + 1]).read_text())


@pytest.mark.slow
def test_a_recipe_is_planned_without_weights(recipe, capsys):
    """Also a recipe for a GPU on a machine that has none: bf16 is on, and `use_cpu` is not."""
    plan = plan_of(recipe)
    text = capsys.readouterr().out
    assert plan["device"] == "cuda" and plan["notes"] == []
    stages = {stage["name"]: stage for stage in plan["stages"]}
    assert list(stages) == ["specialists", "reference losses", "generalists", "evaluation"]
    assert all(name in text for name in stages) and "8 GB and up" in text and "a GPU of 8 GB holds the run" in text
    assert stages["specialists"]["steps"] == 2 * 10 and stages["generalists"]["steps"] == 2 * 20
    assert stages["specialists"]["memory"]["reference"] == 0
    assert stages["reference losses"]["memory"]["optimizer"] == 0
    # One generalist runs the policy alone, on packed rows; a plain DPO run runs both, padded
    assert 0.2 < stages["generalists"]["cost"] / 2 < 0.7
    assert plan["total_cost"] == pytest.approx(sum(stage["cost"] for stage in plan["stages"]))
    assert len(plan["variants"]) == 4
    assert not (Path(recipe[2]).parent / "out").exists()


@pytest.mark.slow
def test_processes_divide_the_steps(recipe, capsys):
    plan = plan_of([*recipe, "--num_processes", "4", "--use_cpu"])
    assert plan["processes"] == 4 and plan["device"] == "cpu"
    assert next(stage for stage in plan["stages"] if stage["name"] == "generalists")["steps"] == 2 * 2 * 3
    text = capsys.readouterr().out
    assert "4 processes" in text and "gradients twice" in text
    # The buckets of DistributedDataParallel are copies of the gradients
    generalist = next(stage["memory"] for stage in plan["stages"] if stage["name"] == "generalists")
    assert generalist["gradients"] == 2 * 4 * generalist["trainable"]
    plan = plan_of([*recipe, "--accelerate_config", "zero3"])
    assert any("DEEPSPEED" in note and "not modelled" in note for note in plan["notes"])
    generalist = next(stage["memory"] for stage in plan["stages"] if stage["name"] == "generalists")
    assert generalist["gradients"] == 4 * generalist["trainable"]


@pytest.mark.slow
def test_a_specialist_of_another_length_is_planned_with_it(recipe, tmp_path):
    path = tmp_path / "recipe.yaml"
    before = {stage["name"]: stage for stage in plan_of(recipe)["stages"]}
    path.write_text(path.read_text() + "\nspecialist_args: {max_length: 9}\n")
    after = {stage["name"]: stage for stage in plan_of(recipe)["stages"]}
    longest = [prompt + max(answers) for prompt, *answers in after["specialists"]["memory"]["pairs"]]
    assert max(longest) <= 9 and after["specialists"]["tokens"] < before["specialists"]["tokens"]
    assert after["generalists"] == before["generalists"]


@pytest.mark.slow
def test_attention_that_cannot_be_packed_is_planned_padded(recipe, capsys):
    plan = plan_of([*recipe, "--attn_implementation", "eager"])
    assert len(plan["variants"]) == 2 and not plan["stages"][0]["memory"]["packed"]
    assert "Planned without the fast path: attn_implementation='eager'" in capsys.readouterr().out
    plan = plan_of([*recipe, "--prefix_sharing", "false", "--lora_target_modules", "all-linear"])
    assert "prefix_sharing is off" in plan["notes"][0] and len(plan["variants"]) == 2
    # A flash attention of the Hub takes packed pairs, as those of packages do
    plan = plan_of([*recipe, "--attn_implementation", "kernels-community/flash-attn2"])
    assert len(plan["variants"]) == 4 and plan["stages"][0]["memory"]["packed"]


@pytest.mark.slow
def test_full_fine_tuning_keeps_a_reference_for_the_specialists(recipe):
    plan = plan_of([*recipe, "--use_peft", "false", "--use_cpu"])
    stages = {stage["name"]: stage["memory"] for stage in plan["stages"]}
    assert stages["specialists"]["reference"] > 0 and stages["generalists"]["reference"] == 0


@pytest.mark.slow
def test_data_that_cannot_be_loaded_is_said_and_assumed(recipe, tmp_path, capsys):
    plan = plan_of([*recipe, "--tasks_dir", str(tmp_path / "nowhere")])
    assert "half of it with the prompt" in plan["notes"][0] and "nowhere" in plan["notes"][0]
    generalist = next(stage for stage in plan["stages"] if stage["name"] == "generalists")
    assert generalist["steps"] is None and generalist["memory"]["peak"] > 0
    assert "?" in capsys.readouterr().out
    plan = plan_of([*recipe, "--tasks_dir", str(tmp_path / "nowhere"), "--max_steps", "7"])
    assert next(stage for stage in plan["stages"] if stage["name"] == "generalists")["steps"] == 14


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--model_name_or_path", "./nowhere"], "./nowhere"),
        (["--device", "toaster"], "toaster"),
        (["--json", "/nowhere/plan.json"], "cannot be written"),
        (["--lora_target_modules", "no_such_layer"], "no_such_layer"),
        (["--learning_rats", "1"], "learning_rate"),
    ],
)
def test_bad_input_is_one_sentence(recipe, capsys, flags, expected):
    with pytest.raises(SystemExit) as raised:
        cli.main([*recipe, *flags])
    assert raised.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("trl ama-plan: error: ") and expected in line


@pytest.mark.slow
def test_no_weights_file_is_opened(recipe, tmp_path, kept_traces):
    """Neither by Python, whose audit hook sees every file, nor by Rust, which would find no weights in these."""
    kept_traces.clear()  # of the first plan, all of it is seen
    for name in ("model.safetensors", "pytorch_model.bin"):
        (tmp_path / "model" / name).write_bytes(b"no weights at all")
    opened = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    expected = plan_of(recipe)
    assert any(path.endswith("config.json") for path in opened)
    assert not [path for path in opened if path.endswith((".safetensors", ".bin"))]
    for name in ("model.safetensors", "pytorch_model.bin"):
        (tmp_path / "model" / name).unlink()
    assert plan_of(recipe) == expected


@pytest.mark.slow
def test_nothing_of_the_weights_is_asked_of_the_hub(recipe, model_dir, tmp_path, hub):
    from huggingface_hub import HfApi

    api, weights = HfApi(), "model.safetensors"
    api.create_repo("alice/base")
    api.upload_folder(repo_id="alice/base", folder_path=tmp_path / "model")
    api.upload_file(repo_id="alice/base", path_or_fileobj=f"{model_dir}/{weights}", path_in_repo=weights)
    seen = len(hub.requests)
    plan_of([*recipe, "--model_name_or_path", "alice/base"])
    paths = [request.path for request in hub.requests[seen:]]
    assert any(path.endswith("config.json") for path in paths)
    assert not [path for path in paths if "safetensors" in path or path.endswith(".bin")]


@pytest.mark.slow
def test_a_model_without_attention_has_a_plan(recipe, tmp_path, capsys):
    config = MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    config.save_pretrained(tmp_path / "model")
    plan = plan_of([*recipe, "--lora_target_modules", "in_proj", "x_proj"])
    assert not plan["stages"][2]["memory"]["packed"] and plan["total_cost"] > 0
    assert "Planned without the fast path" in capsys.readouterr().out


@pytest.mark.slow
def test_weights_that_are_stored_quantised(recipe, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    whole = plan_of(recipe)["stages"][2]["memory"]["weights"]
    change_config(tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True).to_dict())
    assert plan_of(recipe)["stages"][2]["memory"]["weights"] < whole
    change_config(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main(recipe)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "are stored as 'gptq'" in line and "load_in_4bit" in line


@pytest.mark.slow
def test_a_configuration_that_nobody_knows(recipe, tmp_path, capsys):
    change_config(tmp_path, model_type="from_the_future")
    with pytest.raises(SystemExit):
        cli.main(recipe)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("trl ama-plan: error: ") and "from_the_future" in line


@pytest.mark.slow
def test_the_page_is_true(recipe, tmp_path, monkeypatch):
    """Its command runs (with this recipe), and the cards are those of the code."""
    from trl_ama.plan.text import CARDS

    page = (DOCS / "plan.md").read_text()
    words = re.search(r"^```bash\ntrl (ama-plan .*)\n```", page, re.MULTILINE)[1].split()
    words[words.index("--config") + 1] = recipe[2]
    monkeypatch.chdir(tmp_path)
    plan = plan_of(words)
    assert all(stage["memory"]["pairs"] for stage in plan["stages"])
    text = " ".join(page.split())
    assert f"for {', '.join(map(str, list(CARDS)[:-1]))} and 80 GB" in text
    assert all(f"{held:.2f}" in text for held in CARDS.values())
