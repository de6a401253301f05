"""QLoRA once through the whole pipeline on a real model and real pairs: memory, log-probs, sizes, and what each merge loses.

    python tests/benchmarks/qlora.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data folder/of/<task>_train.jsonl[.gz]

Each stage is a process of its own, so its peak of resident memory is its own. Printed, and written to `qlora.json`:

- peak memory by stage, beside that of a process that has only imported the libraries;
- log-probs of the loss dataset against those of TRL's DPOTrainer on its plain path, before its first step and with a
  specialist's weights in it;
- the size of a saved adapter;
- held-out tokens under the quantised base with the adapter, against the merged checkpoints.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
from real_pairs import TASKS, add_material, read_pairs, why_not


STAGES = ("specialists", "losses", "train", "eval")


def write_recipe(options: argparse.Namespace) -> None:
    """`<task>_{train,test}.jsonl` and `config.yaml` in the working folder."""
    from transformers import AutoTokenizer

    tokenizer, tasks = AutoTokenizer.from_pretrained(options.model), TASKS[-options.tasks :]
    for task in tasks:
        for split, count in (("train", options.pairs), ("test", options.held_out)):
            pairs = islice(read_pairs(options.data, task, split, tokenizer, options.max_length), count)
            (options.folder / f"{task}_{split}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    recipe = {
        "model_name_or_path": options.model,
        "tasks": [{"task": task, "path": "local/pairs", "eval_split": "test"} for task in tasks],
        "tasks_dir": str(options.folder),
        "output_dir": str(options.folder / "run"),
        "mixing": "ama_s",
        "use_peft": True,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "lora_target_modules": "all-linear",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "use_bnb_nested_quant": True,
        "dtype": "bfloat16",
        "bf16": True,
        "use_cpu": options.use_cpu,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "optim": "adamw_torch",
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "constant",
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch_size,
        "per_device_eval_batch_size": options.batch_size,
        "max_length": options.max_length,
        "beta": 0.1,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 0,
    }
    (options.folder / "config.yaml").write_text(json.dumps(recipe))


def parse(options: argparse.Namespace) -> tuple:
    from trl import ModelConfig, TrlParser

    from trl_ama import AMAConfig, TaskMixtureConfig
    from trl_ama.recipe.arguments import PipelineArguments

    parser = TrlParser((PipelineArguments, AMAConfig, ModelConfig, TaskMixtureConfig))
    return parser.parse_args_and_config(["--config", str(options.folder / "config.yaml")])


def run_stage(options: argparse.Namespace) -> dict:
    from trl_ama import run_pipeline

    run_pipeline(*parse(options), stages=(options.stage,))
    return {}


def run_imports(options: argparse.Namespace) -> dict:
    import bitsandbytes  # noqa: F401

    from trl_ama import AMATrainer, run_pipeline  # noqa: F401

    parse(options)
    return {}


# ---- Log-probs against TRL's own ----


def run_compare(options: argparse.Namespace) -> dict:
    """Differences per token of the loss dataset from TRL's plain forward pass in training mode."""
    import torch
    from peft.utils import set_peft_model_state_dict
    from safetensors.torch import load_file
    from trl import DPOTrainer

    from trl_ama.pipeline.run_losses import joined_data
    from trl_ama.policies.quantized import keep_weights
    from trl_ama.recipe.settings import RunSettings

    settings = RunSettings(*parse(options))
    joined = joined_data(settings)["train"]
    trainer = DPOTrainer(
        model=settings.recipe.model_name,
        args=settings.recipe.with_arguments(output_dir=str(options.folder / "other"), precompute_ref_log_probs=False),
        train_dataset=joined.select_columns(["prompt", "chosen", "rejected"]),
        quantization_config=settings.recipe.quantization_config(),
        peft_config=settings.inputs.peft_config(),
    )
    keep_weights(trainer.model)
    trainer.model.train()

    def differences(rows: list[int], columns: tuple[str, str]) -> list[float]:
        found = []
        for start in range(0, len(rows), options.batch_size):
            part = rows[start : start + options.batch_size]
            inputs = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[row] for row in part]))
            mask = inputs["completion_mask"]
            with torch.no_grad(), trainer.accelerator.autocast():
                outputs = trainer.model(
                    input_ids=inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    labels=inputs["input_ids"].masked_fill(mask == 0, -100),
                    use_cache=False,
                    fused_lm_head=True,
                )
            sums, counts = (outputs.log_probs * mask[:, 1:]).sum(1).chunk(2), mask.sum(1).chunk(2)
            for side, column in enumerate(columns):
                distance = (sums[side].float().cpu() - torch.tensor([joined[column][row] for row in part])).abs()
                found += (distance / counts[side].cpu()).tolist()
        return found

    result = {"reference": differences(list(range(len(joined))), ("ref_chosen_logps", "ref_rejected_logps"))}
    for number, task in enumerate(settings.recipe.task_names):
        weights = load_file(settings.folder.specialist(task) / "adapter_model.safetensors")
        set_peft_model_state_dict(trainer.model, weights)
        rows = [row for row, label in enumerate(joined["task"]) if label == number]
        result[task] = differences(rows, ("specialist_chosen_logps", "specialist_rejected_logps"))
    adapter = settings.folder.generalist("ama_s") / "adapter_model.safetensors"
    return {
        "nats_per_token": {
            name: {"mean": float(np.mean(values)), "largest": max(values)} for name, values in result.items()
        },
        "adapter_bytes": adapter.stat().st_size,
        "adapter_parameters": sum(value.numel() for value in load_file(adapter).values()),
        "base_bytes": sum(
            value.numel() * value.element_size() for value in trainer.model.get_base_model().parameters()
        ),
    }


# ---- Merges ----


def run_merge(options: argparse.Namespace) -> dict:
    """How far held-out tokens are from what they are under the quantised base with the adapter."""
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_ama.merge.merge import merge_adapter
    from trl_ama.policies.quantized import keep_weights
    from trl_ama.recipe.settings import RunSettings

    settings = RunSettings(*parse(options))
    folder = str(settings.folder.generalist("ama_s"))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = []
    for task in settings.recipe.task_names:
        for line in (options.folder / f"{task}_test.jsonl").read_text().splitlines():
            row = json.loads(line)
            texts += [
                tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=False)
                for side in ("chosen", "rejected")
            ]

    @torch.no_grad()
    def log_probs(model: torch.nn.Module) -> torch.Tensor:
        model.eval()
        found = []
        for text in texts[: options.merge_texts]:
            ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"].to(model.device)
            scores = model(ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
            found.append(scores.gather(1, ids[0, 1:, None]).squeeze(1).cpu())
        return torch.cat(found)

    def trained() -> torch.nn.Module:
        quantization = settings.recipe.quantization_config()
        model = AutoPeftModelForCausalLM.from_pretrained(
            folder, quantization_config=quantization, dtype=torch.bfloat16
        )
        keep_weights(model)
        return model

    model = trained()
    expected = log_probs(model)
    with model.disable_adapter():
        found = {"4-bit base without the adapter": log_probs(model)}
    found["4-bit merge (PEFT)"] = log_probs(model.merge_and_unload())
    del model
    for name, kwargs in {
        "dequantised merge, float32": {"save_dtype": "float32"},
        "dequantised merge, bfloat16": {"save_dtype": "bfloat16"},
        "16-bit base merge, bfloat16": {"into": "base", "save_dtype": "bfloat16"},
        "16-bit base merge, float32": {"into": "base", "save_dtype": "float32"},
    }.items():
        output = options.folder / name.replace(" ", "_")
        merge_adapter(folder, output, base_model=options.model, base_revision="main", overwrite=True, **kwargs)
        found[name] = log_probs(AutoModelForCausalLM.from_pretrained(output))
    result = {}
    for name, values in found.items():
        distance = (values - expected).abs()
        result[name] = {"mean": distance.mean().item(), "largest": distance.max().item()}
    return {"merges": result, "tokens": len(expected)}


# ---- All of them ----


def run_child(options: argparse.Namespace) -> None:
    start = time.perf_counter()
    run = {"imports": run_imports, "compare": run_compare, "merge": run_merge}.get(options.stage, run_stage)
    result = run(options)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB, on Linux
    result |= {"peak_mib": peak, "seconds": time.perf_counter() - start}
    (options.folder / f"{options.stage}.json").write_text(json.dumps(result))


def report(results: dict[str, dict]) -> None:
    print(f"\n{'stage':<14}{'peak MiB':>10}{'seconds':>9}")
    for stage, result in results.items():
        print(f"{stage:<14}{result['peak_mib']:>10.0f}{result['seconds']:>9.0f}")
    compare = results["compare"]
    print("\nLoss dataset against TRL's DPOTrainer, plain path, training mode: nats a token")
    for name, value in compare["nats_per_token"].items():
        print(f"  {name:<12} mean {value['mean']:.4f}, largest {value['largest']:.4f}")
    size, numbers = compare["adapter_bytes"], compare["adapter_parameters"]
    print(f"\nAdapter: {size / 1e6:.2f} MB for {numbers:,} parameters (bf16: {2 * numbers / 1e6:.2f} MB)")
    print(f"\nAgainst the 4-bit base with the adapter, {results['merge']['tokens']} held-out tokens: nats a token")
    for name, value in results["merge"]["merges"].items():
        print(f"  {name:<32} mean {value['mean']:.4f}, largest {value['largest']:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_material(parser)
    parser.add_argument("--tasks", type=int, default=2, help="how many of the tasks, from the last")
    parser.add_argument("--pairs", type=int, default=16, help="training pairs of each task")
    parser.add_argument("--held_out", type=int, default=6, help="held-out pairs of each task")
    parser.add_argument("--merge_texts", type=int, default=12, help="answers to compare the merges on")
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--use_cpu", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--folder", type=Path, help="where to work; a stage that is done there is not done again")
    parser.add_argument(
        "--stage", choices=("imports", *STAGES, "compare", "merge"), help="run one alone, in this process"
    )
    options = parser.parse_args()
    reason = why_not(options)
    if reason is not None:
        raise SystemExit(reason)
    if options.stage:
        run_child(options)
        return
    options.folder = options.folder or Path(tempfile.mkdtemp(prefix="qlora_"))
    options.folder.mkdir(parents=True, exist_ok=True)
    write_recipe(options)
    results = {}
    for stage in ("imports", *STAGES, "compare", "merge"):
        path = options.folder / f"{stage}.json"
        if not path.is_file():
            subprocess.run(
                [sys.executable, *sys.argv, "--folder", str(options.folder), "--stage", stage],
                check=True,
                env=os.environ,
            )
        results[stage] = json.loads(path.read_text())
    (options.folder / "qlora.json").write_text(json.dumps(results, indent=1))
    report(results)


if __name__ == "__main__":
    main()
