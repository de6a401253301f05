"""The fast path against the plain one on every pair of the four tasks: sequence log-probs, scored by the library's own code.

    python tests/benchmarks/same_numbers.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data folder/of/<task>_{train,test}.jsonl[.gz]

Pairs are tokenised and truncated as TRL does it. Each batch's log-probs are appended to `same_numbers.jsonl` in `--output`, and
a run that was stopped goes on where it was; at the end (and with `--report` alone) `same_numbers.json` and `same_numbers.md`
have count, largest and median relative difference by task, and the pairs that differ most. Ends with 1 if one of them differs
by more than `--tolerance` (default: 1e-3 in float32; none in 16 bits, where two orders of the same sum differ by more).

`--tiny` keeps the model's tokenizer and puts a random Llama of two layers in its place, with token ids modulo 1009, as a
vocabulary of 49,152 would take nearly all of the time: minutes for all pairs.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path


sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset, disable_progress_bars  # noqa: E402
from real_pairs import TASKS, read_rows  # noqa: E402
from tiny_models import make_model  # noqa: E402
from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: E402

from trl_ama import AMAConfig  # noqa: E402
from trl_ama.dpo.pair_trainer import ScoringTrainer  # noqa: E402
from trl_ama.dpo.scoring import score_pairs  # noqa: E402


KEYS = ("prompt", "chosen", "rejected")
TINY_VOCABULARY = 1009
WORST = 10


def read(folder: Path, task: str, split: str, limit: int | None) -> list[dict]:
    """Pairs of a file in their order, or `limit` of them that are the same every time, with their place in the file."""
    rows = read_rows(folder, task, split)
    places = range(len(rows)) if limit is None else sorted(np.random.default_rng(0).permutation(len(rows))[:limit])
    return [{**{key: rows[place][key] for key in KEYS}, "place": int(place)} for place in places]


def tiny_model() -> LlamaForCausalLM:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 8192}
    special = {"pad_token_id": None, "eos_token_id": 2, "bos_token_id": 1}
    # Enough for attention to matter
    return make_model(TINY_VOCABULARY, initializer_range=0.3, tie_word_embeddings=False, **sizes, **special)


def trainer_for(options: argparse.Namespace, pairs: list[dict]) -> ScoringTrainer:
    args = AMAConfig(
        output_dir=tempfile.mkdtemp(),
        model_init_kwargs=None if options.tiny else {"dtype": options.dtype},
        bf16=options.dtype == "bfloat16",
        max_length=options.max_length,
        precompute_ref_log_probs=True,  # so that no reference model is loaded
        per_device_eval_batch_size=options.batch_size,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
    )
    model = options.model
    if options.tiny:
        model = tiny_model().to(getattr(torch, options.dtype))
    return ScoringTrainer(
        model,
        args=args,
        train_dataset=Dataset.from_list(pairs),
        processing_class=AutoTokenizer.from_pretrained(options.model),
    )


def small_ids(row: dict) -> dict:
    return {
        name: [token % TINY_VOCABULARY for token in row[name]] for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    }


def run(options: argparse.Namespace, task: str, split: str, log: Path) -> None:
    """Score the pairs of a file that the log does not have yet."""
    done = {row["place"] for row in read_log(log) if (row["task"], row["split"]) == (task, split)}
    pairs = read(options.data, task, split, options.limit)
    left = [pair for pair in pairs if pair["place"] not in done]
    print(f"{task} {split}: {len(pairs)} pairs, {len(left)} to do", flush=True)
    if not left:
        return
    trainer = trainer_for(options, left)
    dataset = trainer.train_dataset
    dataset = dataset.map(small_ids) if options.tiny else dataset
    sharing, places = trainer.prefix_sharing, dataset["place"]
    for start in range(0, len(dataset), options.chunk):
        part = dataset.select(range(start, min(start + options.chunk, len(dataset))))
        scores = {}
        for path, mode in (("fast", True), ("plain", False)):  # True: an error rather than the plain path
            sharing.mode, began = mode, time.perf_counter()
            scores[path] = score_pairs(trainer, trainer.model, part, "")
            scores[path]["seconds"] = time.perf_counter() - began
        with open(log, "a") as file:
            for row in range(len(part)):
                line = {"task": task, "split": split, "place": places[start + row]}
                for path, found in scores.items():
                    line[path] = [float(found[f"{side}_logps"][row]) for side in KEYS[1:]]
                line["tokens"] = [int(scores["fast"][f"{side}_tokens"][row]) for side in KEYS[1:]]
                file.write(json.dumps(line) + "\n")
        seconds = {path: round(found["seconds"], 1) for path, found in scores.items()}
        print(f"  {start + len(part)} of {len(dataset)}, seconds: {seconds}", flush=True)


def read_log(log: Path) -> list[dict]:
    if not log.exists():
        return []
    rows = []
    for line in log.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # the line at which a run was stopped
            continue
    return rows


def difference(row: dict) -> float:
    """Of a pair's two sequences, the larger relative difference; of sums below one nat, the absolute one."""
    fast, plain = np.array(row["fast"]), np.array(row["plain"])
    worst = (np.abs(fast - plain) / np.maximum(np.abs(plain), 1.0)).max()
    return float(worst) if np.isfinite(worst) else float("inf")


def report(rows: list[dict], options: argparse.Namespace) -> dict:
    result = {
        "model": "tiny" if options.tiny else options.model,
        "dtype": options.dtype,
        "max_length": options.max_length,
    }
    result["tasks"] = {}
    for task in [*TASKS, "all"]:
        own = [row for row in rows if task in ("all", row["task"])]
        if not own:
            continue
        differences = np.array([difference(row) for row in own])
        worst = [own[index] for index in np.argsort(-differences)[:WORST]]
        result["tasks"][task] = {
            "pairs": len(own),
            "tokens": int(sum(sum(row["tokens"]) for row in own)),
            "largest": float(differences.max()),
            "median": float(np.median(differences)),
            "bits_equal": float(np.mean([row["fast"] == row["plain"] for row in own])),
            "worst": [f"{row['task']}_{row['split']}:{row['place']} ({difference(row):.1e})" for row in worst],
        }
    return result


def markdown(result: dict) -> str:
    lines = [
        f"# Fast against plain path: {result['model']}, {result['dtype']}, max_length {result['max_length']}",
        "",
        "Relative difference of a pair's sequence log-probs (the larger of its two).",
        "",
        "| task | pairs | answer tokens | largest | median | most different pairs |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for task, found in result["tasks"].items():
        lines.append(
            f"| {task} | {found['pairs']:,} | {found['tokens']:,} | {found['largest']:.1e} | {found['median']:.1e} | "
            f"{', '.join(found['worst'][:3])} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--splits", nargs="+", default=["test", "train"])
    parser.add_argument("--limit", type=int, help="pairs of each file")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--chunk", type=int, default=32, help="pairs between two lines of progress")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--tolerance", type=float)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--report", action="store_true", help="only of what is there")
    parser.add_argument("--output", type=Path, default=Path("same_numbers"))
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    disable_progress_bars()
    options.output.mkdir(parents=True, exist_ok=True)
    log = options.output / "same_numbers.jsonl"
    settings = {name: str(getattr(options, name)) for name in ("model", "dtype", "max_length", "tiny")}
    header = options.output / "settings.json"
    if header.exists() and json.loads(header.read_text()) != settings:
        parser.error(f"{options.output} has numbers made with {header.read_text()}: name another --output")
    header.write_text(json.dumps(settings))
    if not options.report:
        for split in options.splits:
            for task in options.tasks:
                run(options, task, split, log)
    rows = read_log(log)
    if not rows:
        parser.error("there is nothing to report")
    result = report(rows, options)
    (options.output / "same_numbers.json").write_text(json.dumps(result, indent=1))
    (options.output / "same_numbers.md").write_text(markdown(result))
    print(markdown(result))
    tolerance = options.tolerance or (1e-3 if options.dtype == "float32" else float("inf"))
    return 0 if result["tasks"]["all"]["largest"] <= tolerance else 1


if __name__ == "__main__":
    sys.exit(main())
