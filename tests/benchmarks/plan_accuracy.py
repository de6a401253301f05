"""The plan of `trl ama-plan` against measured memory: three configurations on the CPU, and published figures of 7B models.

    python tests/benchmarks/plan_accuracy.py --model HuggingFaceTB/SmolLM2-135M-Instruct

Measured is the peak resident memory of a process of its own that trains an AMATrainer for a few steps on the longest of made-up
pairs, minus what it used before the model was loaded. Load on the machine does not change it. Published figures
need no model: the plan is made from configurations written down here. Writes `plan_accuracy.json` into `--output`.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path


os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from real_pairs import MODEL  # noqa: E402
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, Qwen2Config  # noqa: E402

from trl_ama import AMAConfig, AMATrainer  # noqa: E402
from trl_ama.memory_plan import (  # noqa: E402
    GIB,
    MemorySettings,
    empty_model,
    saved_bytes,
    scoring_memory,
    training_memory,
    weight_bytes,
)


# name → weights' type, LoRA, gradient checkpointing
CASES = {
    "LoRA f32": (torch.float32, True, False),
    "LoRA bf16, gradient checkpointing": (torch.bfloat16, True, True),
    "full f32": (torch.float32, False, False),
}
GOAL = 0.2


def lora(targets: str | list[str] = "all-linear", rank: int = 16) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")


def made_up_pairs(tokenizer, count: int, max_length: int) -> Dataset:
    """Pairs of random words, of a quarter of `max_length` up to all of it, with a reference that nobody computed."""
    rng = np.random.default_rng(0)
    words = [f" {word}" for word in "red blue green stone river light cold warm slow quick paper house".split()]

    def text(tokens: int) -> str:
        return "".join(rng.choice(words, size=tokens))

    rows = []
    for _ in range(count):
        prompt, answer = (int(rng.integers(max_length // 8, max_length // 2 - 4)) for _ in range(2))
        rows.append(
            {
                "prompt": text(prompt),
                "chosen": text(answer),
                "rejected": text(max(4, answer * 3 // 4)),
                "task": "words",
                "ref_chosen_logps": -50.0,
                "ref_rejected_logps": -50.0,
            }
        )
    return Dataset.from_list(rows)


def measure(name: str, options: argparse.Namespace) -> dict:
    """Train in this process; what it took, and the largest batch."""
    dtype, is_lora, checkpoints = CASES[name]
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    pairs = made_up_pairs(tokenizer, 8 * options.batch_size, options.max_length)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    args = AMAConfig(
        output_dir=tempfile.mkdtemp(),
        mixing="proportional",
        model_init_kwargs={"dtype": str(dtype).removeprefix("torch.")},
        bf16=dtype == torch.bfloat16,
        gradient_checkpointing=checkpoints,
        max_length=options.max_length,
        per_device_train_batch_size=options.batch_size,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = AMATrainer(
        options.model, args=args, train_dataset=pairs, peft_config=lora() if is_lora else None
    )
    trainer._reference_unchecked = False  # made-up reference log-probs
    model = trainer.accelerator.prepare_model(trainer.model)
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer()
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    data = trainer.train_dataset
    lengths = [[len(row[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected")] for row in data]
    order = sorted(range(len(data)), key=lambda row: -sum(lengths[row]))
    batches = [order[start : start + options.batch_size] for start in range(0, len(order), options.batch_size)]
    steps = []
    for rows in batches[: options.steps]:
        model.train()
        trainer.training_step(model, dict(trainer.data_collator([data[row] for row in rows])))
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        steps.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
    return {
        "before": before,
        "loaded": loaded - before,
        "steps": steps,
        "peak": steps[-1],
        "pairs": [lengths[row] for row in batches[0]],
        "paths": trainer.prefix_sharing.taken,
    }


def compare(options: argparse.Namespace) -> dict:
    """Plan and measurement of every case."""
    config, result = AutoConfig.from_pretrained(options.model), {}
    for name in options.cases:
        command = [sys.executable, __file__, *sys.argv[1:], "--measure", name]
        measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        dtype, is_lora, checkpoints = CASES[name]
        settings = MemorySettings(
            dtype=dtype,
            autocast=torch.bfloat16 if dtype == torch.bfloat16 else None,
            peft_config=lora() if is_lora else None,
            gradient_checkpointing=checkpoints,
            device="cpu",
        )
        plan = training_memory(config, settings, [tuple(pair) for pair in measured["pairs"]])
        error = plan.peak / measured["peak"] - 1
        result[name] = {"planned": plan.peak, "measured": measured["peak"], "error": error, "plan": vars(plan), **measured}
        print(
            f"{name:<36} planned {plan.peak / GIB:6.2f} GiB  measured {measured['peak'] / GIB:6.2f} GiB  {error:+.0%}"
            f"{'' if abs(error) <= GOAL else '  beyond the goal'}",
            flush=True,
        )
    return result


# ---- Published figures ----

LLAMA_7B = dict(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    tie_word_embeddings=False,
)


def nf4() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def published() -> dict[str, tuple[str, float, float]]:
    """What is compared → where it is from, the published figure and ours, both in the publication's unit."""
    llama = LlamaConfig(**LLAMA_7B, max_position_embeddings=16384)
    qwen = Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    half = torch.bfloat16
    quantised = MemorySettings(dtype=half, autocast=half, quantization=nf4(), peft_config=lora(rank=8))
    bare = MemorySettings(dtype=half, quantization=nf4())
    flash = MemorySettings(
        dtype=half,
        autocast=half,
        attention="flash_attention_2",
        gradient_checkpointing=True,
        accumulates=True,
        peft_config=lora(["q_proj", "k_proj", "v_proj", "o_proj"], rank=8),
    )
    # One sequence of n tokens, as in supervised training, is a pair whose second answer has one token
    one = lambda tokens: [(1, tokens - 1, 1)]  # noqa: E731
    qlora = [training_memory(llama, MemorySettings(**{**vars(quantised), "gradient_checkpointing": c}), one(512)) for c in (False, True)]
    return {
        "4-bit base of LLaMA 7B, MB": ("QLoRA, section 2", 5048, weight_bytes(empty_model(llama, bare)) / 1e6),
        "LoRA weights of 0.2 %, MB": ("QLoRA, section 2", 26, saved_bytes(empty_model(llama, quantised)) / 1e6),
        "input gradients, MB": ("QLoRA, section 2", 567, qlora[0].activations / 1e6),
        "the same, gradient checkpointing, MB": ("QLoRA, section 2", 18, qlora[1].activations / 1e6),
        "Qwen2.5 7B in NF4, GB": ("S. Nath, dev.to 2026", 5.44, weight_bytes(empty_model(qwen, MemorySettings(dtype=torch.float16, quantization=nf4()))) / 1e9),
        "Llama 2 7B, LoRA, 8,192 tokens, flash, GB": ("LongLoRA, table 12", 25.7, training_memory(llama, flash, one(8192)).peak / 1e9),
        "the same, scoring only": ("–", float("nan"), scoring_memory(llama, flash, one(8192)).peak / 1e9),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.environ.get(MODEL), help=f"folder or Hub id; ${MODEL} by default")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--published", action="store_true", help="also hold the plan against published figures")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options)))
        return
    result = {}
    if options.published:
        result["published"] = published()
        for name, (source, theirs, ours) in result["published"].items():
            print(f"{name:<44} {source:<22} published {theirs:>9,.2f}  planned {ours:>9,.2f}", flush=True)
    if options.model:
        result["measured"] = compare(options)
    else:
        print(f"Nothing measured: no model; pass --model, or set {MODEL}.")
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "plan_accuracy.json").write_text(json.dumps(result, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
