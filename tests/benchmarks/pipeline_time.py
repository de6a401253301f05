"""Wall time of the whole of AMA (specialists, reference losses, generalist) against one run of TRL's DPOTrainer.

    python tests/benchmarks/pipeline_time.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data folder/of/<task>_train.jsonl[.gz]

Four tasks, the same pairs, one epoch each, batch, precision and LoRA the same. DPOTrainer runs in its default setting (all
tasks in one dataset, reference log-probs as it goes, gradient checkpointing), and without gradient checkpointing. Each run is
a process of its own, timed from its start to its end, and the two take turns. Writes `pipeline.json` and `pipeline.md`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
from real_pairs import TASKS, add_material, measured_before, read_pairs, why_not


RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "smollm2-135m-4tasks" / "ama" / "config_lora.yaml"
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


def write_pairs(options: argparse.Namespace, folder: Path) -> None:
    """`<task>_train.jsonl` with the pairs of the benchmark."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    folder.mkdir(parents=True)
    for task in TASKS:
        pairs = islice(read_pairs(options.data, task, "train", tokenizer, options.max_length), options.pairs)
        (folder / f"{task}_train.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def run_trl(options: argparse.Namespace, pairs: Path, output: Path, dtype: str, checkpointing: bool) -> None:
    """One epoch of DPO over all tasks' pairs."""
    from datasets import load_dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    dataset = load_dataset("json", data_files=[str(pairs / f"{task}_train.jsonl") for task in TASKS], split="train")
    args = DPOConfig(
        output_dir=str(output),
        model_init_kwargs={"dtype": dtype},
        bf16=dtype == "bfloat16",
        max_length=options.max_length,
        per_device_train_batch_size=options.batch_size,
        num_train_epochs=1,
        gradient_checkpointing=checkpointing,
        save_strategy="no",
        report_to="none",
        use_cpu=options.use_cpu,
        seed=0,
    )
    trainer = DPOTrainer(options.model, args=args, train_dataset=dataset, peft_config=LoraConfig(**LORA))
    trainer.train()
    trainer.save_model(str(output))


def run_ours(options: argparse.Namespace, pairs: Path, output: Path, dtype: str, checkpointing: bool) -> None:
    """Specialists, reference losses and generalist by the recipe, an epoch each, nothing held out."""
    import yaml

    from trl_ama.pipeline.run import run_pipeline
    from trl_ama.scripts.common import make_parser, parse_arguments

    values = yaml.safe_load(RECIPE.read_text(encoding="utf-8")) | {
        "model_name_or_path": options.model, "tasks_dir": str(pairs), "output_dir": str(output), "dtype": dtype,
        "bf16": dtype == "bfloat16", "max_length": options.max_length, "gradient_checkpointing": checkpointing,
        "per_device_train_batch_size": options.batch_size, "per_device_eval_batch_size": options.batch_size,
        "num_train_epochs": 1, "max_steps": -1, "specialist_args": {}, "save_strategy": "no", "use_cpu": options.use_cpu,
        "compare": [], "logging_steps": 10,
    }  # fmt: skip
    del values["test_split_size"]  # DPOTrainer trains on all pairs, too
    config = output / "config.yaml"
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    settings = parse_arguments(make_parser("ama", prog="pipeline_time"), ["--config", str(config)])
    run_pipeline(*settings, stages=("specialists", "losses", "train"))
    for stage in ("specialists", "generalists"):
        found = [json.loads(file.read_text())["result"]["steps"] for file in (output / stage).glob("*/stage.json")]
        each = -(-options.pairs // options.batch_size)
        expected = (
            [each] * len(TASKS) if stage == "specialists" else [-(-options.pairs * len(TASKS) // options.batch_size)]
        )
        if found != expected:
            raise SystemExit(f"The {stage} took {found} steps instead of {expected}: not the same pairs.")


def timed(kind: str, pairs: Path, dtype: str, checkpointing: bool) -> float:
    """Seconds of a process that does one of the two."""
    with tempfile.TemporaryDirectory() as output:
        command = [
            sys.executable,
            __file__,
            *sys.argv[1:],
            "--part",
            kind,
            str(pairs),
            output,
            dtype,
            str(int(checkpointing)),
        ]
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start


def table(result: dict) -> str:
    """The result as Markdown."""
    lines = [
        "| wall seconds | one DPO run by TRL | all of AMA | AMA / TRL |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, figures in result["runs"].items():
        trl, ours = (np.median(figures[kind]) for kind in ("trl", "ours"))
        ratio = np.median(np.array(figures["ours"]) / np.array(figures["trl"]))
        lines.append(f"| {name} | {trl:.0f} | {ours:.0f} | **{ratio:.2f}** |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_material(parser)
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"))
    parser.add_argument("--pairs", type=int, default=16, help="of each task")
    parser.add_argument("--passes", type=int, default=1)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--checkpointing", nargs="+", type=int, default=[1, 0], help="gradient checkpointing on, off")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--use_cpu", action="store_true")
    parser.add_argument("--part", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if why_not(options):
        print(f"Skipped: {why_not(options)}.")
        return
    if options.part:
        kind, pairs, output, dtype, checkpointing = options.part
        run = run_trl if kind == "trl" else run_ours
        run(options, Path(pairs), Path(output), dtype, bool(int(checkpointing)))
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    options.output.mkdir(parents=True, exist_ok=True)
    result: dict = {"pairs_a_task": options.pairs, "batch_size": options.batch_size, "runs": {}}
    result["runs"] = measured_before(options.output / "pipeline.json", result, "runs")
    with tempfile.TemporaryDirectory() as folder:
        pairs = Path(folder) / "pairs"
        write_pairs(options, pairs)
        for dtype in options.dtypes:
            for checkpointing in map(bool, options.checkpointing):
                name = f"{dtype}, {'gradient checkpointing (the default)' if checkpointing else 'no gradient checkpointing'}"
                figures = result["runs"][name] = {"trl": [], "ours": []}
                for _ in range(options.passes):
                    for kind, seconds in figures.items():
                        seconds.append(timed(kind, pairs, dtype, checkpointing))
                    print(name, figures, flush=True)
                    (options.output / "pipeline.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.output / "pipeline.md").write_text(table(result))
    print("\n" + table(result))


if __name__ == "__main__":
    main()
