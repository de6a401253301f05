"""What it costs and saves to leave clipped pairs out of the backward pass, by the share of pairs that are clipped.

    python tests/benchmarks/clipped.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data folder/of/<task>_train.jsonl[.gz]

Steps of one AMATrainer (LoRA, float32) on batches of one task each, with `skip_clipped` off and on in turn, without and with
gradient checkpointing. Which pairs are clipped is made up, by the losses of their specialists: what a step costs does not
depend on why. Processor time of one thread; medians over batches and rounds. Writes `clipped.json` and `clipped.md`.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path


os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from real_pairs import TASKS, add_material, read_pairs, why_not  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from trl_ama import AMAConfig, AMATrainer  # noqa: E402


BEATEN, MATCHLESS = (-5000.0, 0.0), (0.0, -5000.0)  # log-probs of a specialist with a loss far above, or of 0


def cut(model: torch.nn.Module, layers: int) -> None:
    """Leave a model its first layers, and a vocabulary that is smaller by as much: layers and head keep their shares of a step."""
    whole = len(model.model.layers)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    model.resize_token_embeddings(model.config.vocab_size * layers // whole)
    for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
        embeddings.requires_grad_(False)


def build(options: argparse.Namespace, checkpointing: bool) -> AMATrainer:
    """A trainer on the pairs of all tasks, ready for single steps."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    count = options.batches * options.batch_size
    pairs = [
        {**pair, "task": task}
        for task in TASKS
        for pair in islice(read_pairs(options.data, task, "train", tokenizer, options.max_length), count)
    ]
    args = AMAConfig(
        output_dir=tempfile.mkdtemp(),
        mixing="ama_r",
        model_init_kwargs={"dtype": "float32"},
        bf16=False,
        max_length=options.max_length,
        per_device_train_batch_size=options.batch_size,
        gradient_checkpointing=checkpointing,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    peft = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    dataset = Dataset.from_list(pairs)
    for column in ("ref_chosen_logps", "ref_rejected_logps", "specialist_chosen_logps", "specialist_rejected_logps"):
        dataset = dataset.add_column(column, [0.0] * len(dataset))
    trainer = AMATrainer(options.model, args=args, train_dataset=dataset, peft_config=peft)
    trainer.reference_unchecked = False  # made-up reference log-probs
    if options.layers:
        cut(trainer.model.get_base_model(), options.layers)
    if checkpointing:  # else done by `train()`
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    trainer.model.train()
    trainer.create_optimizer()
    return trainer


def batches(trainer: AMATrainer, options: argparse.Namespace) -> dict[str, list[dict]]:
    """The collated batches of each task."""
    rows: dict[str, list[dict]] = {task: [] for task in TASKS}
    for row in trainer.train_dataset:
        rows[trainer.task_names[row["task"]]].append(row)
    size = options.batch_size
    return {
        task: [collate(trainer, found[start : start + size]) for start in range(0, len(found) - size + 1, size)]
        for task, found in rows.items()
    }


def collate(trainer: AMATrainer, rows: list[dict]) -> dict:
    vocabulary = trainer.model.config.vocab_size
    ids = ("prompt_ids", "chosen_ids", "rejected_ids")
    batch = trainer.data_collator([{key: [token % vocabulary for token in row[key]] for key in ids} for row in rows])
    zeros = torch.zeros(len(rows))
    task = torch.tensor([row["task"] for row in rows])
    return {**batch, "task": task, "ref_chosen_logps": zeros, "ref_rejected_logps": zeros}


def with_clipped(batch: dict, count: int) -> dict:
    """The batch with so many clipped pairs, which do not begin or end it if there are two."""
    pairs = len(batch["task"])
    order = sorted(range(pairs), key=lambda pair: (pair % 2 == 0, pair))  # 1, 3, …, 0, 2, …
    clipped = set(order[:count])
    logps = [BEATEN if pair in clipped else MATCHLESS for pair in range(pairs)]
    chosen, rejected = zip(*logps, strict=True)
    return {
        **batch,
        "specialist_chosen_logps": torch.tensor(chosen),
        "specialist_rejected_logps": torch.tensor(rejected),
    }


def step(trainer: AMATrainer, batch: dict, skip: bool) -> float:
    """Seconds of forward, backward and optimizer."""
    trainer.args.skip_clipped = skip
    start = time.process_time()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    seconds = time.process_time() - start
    trainer.mixture.recorder.reset()
    return seconds


def measure(options: argparse.Namespace, checkpointing: bool) -> dict[str, dict[str, float]]:
    """By task: seconds of a step without skipping, and the ratio of one with it to that, by the share that is clipped."""
    trainer = build(options, checkpointing)
    result = {}
    for task, found in batches(trainer, options).items():
        step(trainer, with_clipped(found[0], 1), True)  # the proof of the fast path, and what is made once
        times: dict[str, list[float]] = {}
        ratios: dict[str, list[float]] = {}
        for batch in found * options.rounds:
            shares = [(clipped / options.batch_size, with_clipped(batch, clipped)) for clipped in counts(options)]
            # The cost of all pairs does not depend on the share: before and after the others
            whole = [step(trainer, shares[0][1], False)]
            skipping = {share: step(trainer, part, True) for share, part in shares}
            whole.append(step(trainer, shares[-1][1], False))
            times.setdefault("all", []).append(statistics.mean(whole))
            for share, seconds in skipping.items():
                ratios.setdefault(f"{share:g}", []).append(seconds / statistics.mean(whole))
        result[task] = {
            "seconds": statistics.median(times["all"]),
            **{share: statistics.median(values) for share, values in ratios.items()},
        }
        print(task, checkpointing, {key: round(value, 3) for key, value in result[task].items()}, flush=True)
    return result


def counts(options: argparse.Namespace) -> list[int]:
    return [round(share * options.batch_size) for share in (0, 0.25, 0.5, 0.75, 1)]


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """In Markdown: what a step that skips takes, against one that does not."""
    shares = [key for key in next(iter(next(iter(results.values())).values())) if key != "seconds"]
    lines = [
        f"| gradient checkpointing | task | seconds of a step | {' | '.join(f'{float(s):.0%} clipped' for s in shares)} |",
        f"| --- | --- | ---: | {' | '.join('---:' for _ in shares)} |",
    ]
    for name, by_task in results.items():
        for task, found in by_task.items():
            cells = " | ".join(f"{found[share]:.2f}" for share in shares)
            lines.append(f"| {name} | {task} | {found['seconds']:.2f} | {cells} |")
        means = " | ".join(
            f"**{statistics.mean(found[share] for found in by_task.values()):.2f}**" for share in shares
        )
        lines.append(f"| {name} | **mean of the tasks** | | {means} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_material(parser)
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks"))
    parser.add_argument("--layers", type=int, default=0, help="so many layers of the model; by default all")
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--batches", type=int, default=3, help="of each task")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--checkpointing", type=int, nargs="+", default=[0, 1])
    options = parser.parse_args()
    if reason := why_not(options):
        raise SystemExit(reason)
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    results = {}
    for checkpointing in options.checkpointing:
        results["yes" if checkpointing else "no"] = measure(options, bool(checkpointing))
        (options.output / "clipped.json").write_text(json.dumps(results, indent=2) + "\n")
        (options.output / "clipped.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
