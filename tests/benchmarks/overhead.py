"""What adaptivity costs: strategy, sampler and bookkeeping of an optimizer step, and the sampler on up to 10^7 rows.

    python tests/benchmarks/overhead.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data folder/of/<task>_train.jsonl[.gz]

Three parts in one run: (i) the time of all that a step does beside the model, for every strategy and number of tasks; (ii)
set-up, draws and memory of the sampler by number of rows, with torch's RandomSampler, which the Trainer uses, beside it;
(iii) what share of a real training step that is, and whole steps of `mixing="ama_s"` against `"proportional"` with a tiny
model. Part (iii) needs a model for the share (`--model`, or TRL_AMA_BENCH_MODEL); pairs are made up without `--data`.

Parts (i), (ii) and the tiny model run on one thread and count the processor time of this process, because others may use
the machine too: nothing in them waits for anything, so on a quiet machine it is the elapsed time. The real step uses all
threads and is therefore timed by the clock. Writes `overhead.json` and `overhead.md` into `--output`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace


os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import torch  # noqa: E402
from datasets import ClassLabel, Dataset, Features  # noqa: E402
from real_pairs import add_material  # noqa: E402
from torch.utils.data import RandomSampler, Sampler  # noqa: E402
from whole_steps import share_of_a_step, tiny_model_steps  # noqa: E402

from trl_ama.common.arrays import numpy_column  # noqa: E402
from trl_ama.mixing import STRATEGIES, build_strategy  # noqa: E402
from trl_ama.reference_losses.columns import LOGP_COLUMNS, SPECIALIST_COLUMNS  # noqa: E402
from trl_ama.sampling.mixture import Mixture  # noqa: E402
from trl_ama.sampling.sampler import TaskMixtureSampler, count_tasks  # noqa: E402
from trl_ama.training.by_task import TaskCollator  # noqa: E402


NUMBERS_OF_TASKS = (2, 4, 8, 16, 32, 64)
PARTS = ("draw", "collate", "record", "finish")
SAMPLERS = ("ours, rows grouped by task", "ours, rows scattered", "torch's RandomSampler")
BLOCK, MICRO_BATCH = 32, 8  # pairs of a step and of a micro-batch
clock = time.process_time


# ---- (i) A step ----


def time_step_parts(name: str, num_tasks: int, steps: int, rows: int) -> dict[str, float]:
    """Median microseconds of each part of a step, and of the step."""
    task_ids = np.random.default_rng(0).permutation(np.arange(rows) % num_tasks)
    strategy = build_strategy(name, np.bincount(task_ids))
    mixture = Mixture(strategy, [f"task_{number}" for number in range(num_tasks)], excess_range=0.69)
    sampler: Sampler[int] = RandomSampler(range(rows), generator=torch.Generator().manual_seed(0))
    if strategy.uses_own_sampler:
        sampler = mixture.sampler = TaskMixtureSampler(task_ids, strategy, BLOCK, seed=0)
    mixture.begin(steps)
    process = SimpleNamespace(num_processes=1, device="cpu")
    collate = TaskCollator(lambda examples: {}, columns=LOGP_COLUMNS)
    draws, logged, seen = iter(sampler), {}, []
    next(draws)  # the permutations
    for _ in range(BLOCK - 1):
        next(draws)
    if mixture.sampler is not None:
        mixture.sampler.pop_trained()
    for _ in range(steps):
        times = [clock()]
        drawn = [next(draws) for _ in range(BLOCK)]
        times.append(clock())
        examples = [{"task": int(task_ids[row]), **dict.fromkeys(SPECIALIST_COLUMNS, -30.0)} for row in drawn]
        starts = range(0, BLOCK, MICRO_BATCH)
        times.append(clock())
        batches = [collate(examples[start : start + MICRO_BATCH]) for start in starts]
        times.append(clock())
        losses = [torch.rand(MICRO_BATCH, requires_grad=True) for _ in starts]
        times.append(clock())
        for batch, loss in zip(batches, losses, strict=True):
            mixture.recorder.add(batch["task"], loss, loss, loss)
            mixture.strategy.loss_weights()
        times.append(clock())
        figures, _ = mixture.finish_step(process)
        for key, value in figures.items():  # as the trainer keeps them until it logs
            logged.setdefault(key, []).append(value)
        times.append(clock())
        seen.append([times[1] - times[0], times[3] - times[2], times[5] - times[4], times[6] - times[5]])
    parts = 1e6 * np.array(seen[steps // 10 :])
    medians = dict(zip(PARTS, np.median(parts, axis=0).round(1).tolist(), strict=True))
    return {**medians, "step": round(float(np.median(parts.sum(axis=1))), 1)}


def steps_part(options: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """Strategy → k → figures."""
    rows = max(64 * BLOCK, (options.steps + 2) * BLOCK)
    return {
        name: {str(k): time_step_parts(name, k, options.steps, rows) for k in options.tasks} for name in STRATEGIES
    }


# ---- (ii) The sampler by number of rows ----


def task_column(rows: int, num_tasks: int, is_scattered: bool) -> Dataset:
    """A dataset of a task column alone."""
    task_ids = np.arange(rows, dtype=np.int64) * num_tasks // rows
    if is_scattered:
        np.random.default_rng(0).shuffle(task_ids)
    label = ClassLabel(names=[f"task_{number}" for number in range(num_tasks)])
    return Dataset(pa.table({"task": task_ids}, schema=Features({"task": label}).arrow_schema))


def make_sampler(kind: str, dataset: Dataset, num_tasks: int) -> tuple[Sampler[int], TaskMixtureSampler | None]:
    if kind == SAMPLERS[2]:
        return RandomSampler(dataset, generator=torch.Generator().manual_seed(0)), None
    task_ids = numpy_column(dataset, "task")
    strategy = build_strategy("ama_s", count_tasks(task_ids, num_tasks))
    sampler = TaskMixtureSampler(task_ids, strategy, BLOCK, seed=0)
    return sampler, sampler


def time_sampler(kind: str, rows: int, num_tasks: int, blocks: int) -> dict[str, float]:
    """Seconds until the first draw, and microseconds of each further one, over whole passes where rows are few."""
    dataset = task_column(rows, num_tasks, kind == SAMPLERS[1])
    start = clock()
    sampler, ours = make_sampler(kind, dataset, num_tasks)
    set_up = clock()
    draws = iter(sampler)
    next(draws)
    first = clock()
    seconds = []
    for _ in range(blocks):
        begin = clock()
        for _ in range(BLOCK):
            if next(draws, None) is None:
                draws = iter(sampler)
                next(draws)
        seconds.append(clock() - begin)
        if ours is not None and len(ours.ahead) > 1:
            ours.pop_trained()
    # The mean, not the median: passes that begin in some blocks only are part of the price
    return {
        "set_up_seconds": set_up - start,
        "first_draw_seconds": first - set_up,
        "draw_microseconds": 1e6 * statistics.mean(seconds[blocks // 10 :]) / BLOCK,
    }


def traced_memory(kind: str, rows: int, num_tasks: int) -> float:
    """Megabytes allocated at most, from reading the column to the first blocks; torch's tensors do not show in it."""
    dataset = task_column(rows, num_tasks, kind == SAMPLERS[1])
    tracemalloc.start()
    sampler, _ = make_sampler(kind, dataset, num_tasks)
    draws = iter(sampler)
    for _ in range(min(10 * BLOCK, rows)):
        next(draws)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 1e6


def resident_megabytes() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def resident_growth(kind: str, rows: int, num_tasks: int) -> float:
    """Megabytes by which this process grows when it sets the sampler up and draws; for a process of its own."""
    dataset = task_column(rows, num_tasks, kind == SAMPLERS[1])
    make_sampler(kind, task_column(1000, num_tasks, False), num_tasks)
    before = resident_megabytes()
    sampler, _ = make_sampler(kind, dataset, num_tasks)
    draws = iter(sampler)
    for _ in range(min(10 * BLOCK, rows)):
        next(draws)
    return resident_megabytes() - before


def in_own_process(kind: str, rows: int, num_tasks: int) -> float | None:
    """`resident_growth`, measured in a fresh process; `None` where the system does not say."""
    if not Path("/proc/self/statm").exists():
        return None
    command = [sys.executable, __file__, "--memory-of", kind, str(rows), str(num_tasks)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def sampler_part(options: argparse.Namespace) -> list[dict]:
    """One entry for each sampler, number of rows and of tasks; of torch's, which knows no tasks, for one number."""
    entries = []
    for exponent in options.exponents:
        for num_tasks in (2, 4, 64):
            for kind in SAMPLERS:
                if kind == SAMPLERS[2] and num_tasks != 4:
                    continue
                rows = 10**exponent
                runs = [time_sampler(kind, rows, num_tasks, options.blocks) for _ in range(options.repeats)]
                entry = {"sampler": kind, "rows": rows, "tasks": num_tasks}
                entry |= {key: statistics.median(run[key] for run in runs) for key in runs[0]}
                entry["traced_megabytes"] = traced_memory(kind, rows, num_tasks)
                if num_tasks == 4:
                    entry["resident_megabytes"] = in_own_process(kind, rows, num_tasks)
                entries.append(entry)
                print(json.dumps(entry), flush=True)
    return entries


# ---- The result ----


def table(result: dict) -> str:
    """The result as Markdown."""
    lines = [
        f"Processor time on one thread; blocks of {BLOCK} pairs in micro-batches of {MICRO_BATCH}.",
        "",
        "## Strategy, sampler and bookkeeping of one optimizer step, µs (median)",
        "",
    ]
    counts = list(next(iter(result["steps"].values())))
    lines += [f"| strategy | {' | '.join(f'k = {k}' for k in counts)} | largest / smallest |"]
    lines += ["| --- " + "| ---: " * (len(counts) + 1) + "|"]
    for name, by_tasks in result["steps"].items():
        values = [figures["step"] for figures in by_tasks.values()]
        cells = " | ".join(f"{value:.0f}" for value in values)
        lines.append(f"| `{name}` | {cells} | {max(values) / min(values):.2f} |")
    if "4" in counts:
        lines += ["", f"At k = 4, by part ({', '.join(PARTS)}):", ""]
        for name, by_tasks in result["steps"].items():
            lines.append(f"- `{name}`: " + ", ".join(f"{by_tasks['4'][part]:.0f}" for part in PARTS))
    lines += [
        "",
        "## The sampler",
        "",
        "| rows | k | sampler | set-up, s | first draw, s | a draw, µs | traced peak, MB | resident growth, MB |",
        "| ---: | ---: | --- " + "| ---: " * 5 + "|",
    ]
    for entry in result["sampler"]:
        resident = entry.get("resident_megabytes")
        lines.append(
            f"| {entry['rows']:,} | {entry['tasks']} | {entry['sampler']} | {entry['set_up_seconds']:.4f} | "
            f"{entry['first_draw_seconds']:.4f} | {entry['draw_microseconds']:.2f} | {entry['traced_megabytes']:.1f} | "
            f"{'' if resident is None else format(resident, '.1f')} |"
        )
    tiny, model = result["tiny_model"], result["model"]
    lines += ["", "## Whole steps", ""]
    lines.append(
        f"Tiny model, batch 8: `ama_s` {tiny['ama_s_milliseconds']:.2f} ms, `proportional` "
        f"{tiny['proportional_milliseconds']:.2f} ms, difference {tiny['difference_milliseconds']:+.2f} ms, ratio "
        f"{tiny['ratio']:.3f}."
    )
    if "skipped" in model:
        lines.append(f"Share of a real step: not measured, because {model['skipped']}.")
    else:
        shares = ", ".join(f"`{name}` {share:.4%}" for name, share in model["share"].items())
        lines.append(
            f"The model given, batch {model['pairs_of_a_step']}, {model['pairs']} pairs: {model['step_seconds']:.2f} s a step; "
            f"share of the figures above at k = 4, though they are of {BLOCK} pairs: {shares}."
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_material(parser)
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"))
    parser.add_argument("--steps", type=int, default=1000, help="of part (i), for each strategy and k")
    parser.add_argument("--tasks", type=int, nargs="+", default=list(NUMBERS_OF_TASKS), help="numbers of tasks k")
    parser.add_argument("--exponents", type=int, nargs="+", default=[3, 4, 5, 6, 7], help="numbers of rows, 10^n")
    parser.add_argument("--blocks", type=int, default=500, help="drawn in each run of part (ii)")
    parser.add_argument("--repeats", type=int, default=5, help="of part (ii)")
    parser.add_argument("--rounds", type=int, default=6, help="of the tiny model")
    parser.add_argument("--tiny-steps", type=int, default=60)
    parser.add_argument("--model-steps", type=int, default=5)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        kind, rows, num_tasks = options.memory_of
        print(resident_growth(kind, int(rows), int(num_tasks)))
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    result = {"torch": torch.__version__, "numpy": np.__version__}
    result["steps"] = steps_part(options)
    result["sampler"] = sampler_part(options)
    result["tiny_model"] = tiny_model_steps(options)
    torch.set_num_threads(threads)
    result["model"] = share_of_a_step(options, result["steps"])
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "overhead.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.output / "overhead.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
