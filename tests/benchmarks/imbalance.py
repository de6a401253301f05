"""The imbalance case: three tasks, one with a tenth of the others' pairs; all five mixing strategies over several seeds.

Each seed has its own pairs, base model and training: the quickstart's material and recipe, through the pipeline that
`trl ama` runs. The figures are those of held-out pairs, with 95 % confidence intervals (Student's t) over seeds; the
differences to `proportional` are paired by seed. What was done before is not done again, so the script can be stopped
and started.

    python tests/benchmarks/imbalance.py --seeds 5 --output_dir outputs/imbalance
"""

import argparse
import importlib.util
import json
import math
import statistics
from pathlib import Path
from typing import Any

import yaml


QUICKSTART = Path(__file__).resolve().parents[2] / "recipes" / "quickstart"
RECIPE = QUICKSTART / "ama" / "config_lora.yaml"
RECIPE_ROOT = "outputs/quickstart"  # where the recipe expects what `prepare.py` writes
BASELINE = "proportional"
STRATEGIES = [BASELINE, "uniform", "task_normalized", "ama_r", "ama_s"]
FIGURES = {
    "worst_accuracy": "worst-task accuracy",
    "mean_accuracy": "mean accuracy",
    "worst_excess": "worst-task excess",
}
# 97.5 % quantiles of Student's t with 1, 2, … degrees of freedom
T_QUANTILES = [
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
]  # fmt: skip


def moved(value: Any, folder: Path) -> Any:
    """The recipe's values with the quickstart's folder replaced by `folder`, at any depth."""
    if isinstance(value, dict):
        return {key: moved(part, folder) for key, part in value.items()}
    if isinstance(value, list):
        return [moved(part, folder) for part in value]
    if isinstance(value, str) and (value + "/").startswith(RECIPE_ROOT + "/"):
        return str(folder) + value.removeprefix(RECIPE_ROOT)
    return value


def recipe(folder: Path, seed: int, steps: int | None) -> dict[str, Any]:
    """The quickstart's recipe for one seed, with all five strategies."""
    values = moved(yaml.safe_load(RECIPE.read_text(encoding="utf-8")), folder)
    values["seed"] = seed
    values["compare"] = [name for name in STRATEGIES if name != values["mixing"]]
    if steps is not None:
        values["max_steps"] = steps
    return values


def run_seed(folder: Path, seed: int, steps: int | None) -> dict[str, Any]:
    """Make the seed's material and run the pipeline on it, unless its results are there; return the results."""
    from trl_ama.pipeline.run import run_pipeline
    from trl_ama.scripts.common import make_parser, parse_arguments

    values = recipe(folder, seed, steps)
    config, results = folder / "config.yaml", folder / "run" / "results.json"
    text = yaml.safe_dump(values, sort_keys=False)
    if config.is_file() and config.read_text(encoding="utf-8") != text:
        raise SystemExit(f"'{folder}' was made with another recipe or other --steps. Choose another --output_dir.")
    if results.is_file():
        print(f"seed {seed}: done before", flush=True)
        return json.loads(results.read_text(encoding="utf-8"))
    if not config.is_file():  # written once the material is complete
        spec = importlib.util.spec_from_file_location("quickstart_prepare", QUICKSTART / "prepare.py")
        prepare = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(prepare)
        print(f"seed {seed}: making model and pairs", flush=True)
        prepare.prepare(folder, seed)
    config.write_text(text, encoding="utf-8")
    print(f"seed {seed}: training", flush=True)
    return run_pipeline(*parse_arguments(make_parser("ama", prog="imbalance"), ["--config", str(config)]))


def interval(values: list[float]) -> tuple[float, float | None]:
    """Mean and half the width of its 95 % confidence interval, which a single value has none of."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    quantile = T_QUANTILES[min(len(values) - 1, len(T_QUANTILES)) - 1]
    return mean, quantile * statistics.stdev(values) / math.sqrt(len(values))


def summarize(by_seed: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Per policy and figure: its values by seed, mean ± interval, and the paired difference to the baseline."""
    seeds = list(by_seed)
    policies = {}
    for name in ["base", "specialists", *STRATEGIES]:
        policies[name] = {}
        for figure in FIGURES:
            values, baseline = (
                [by_seed[seed]["policies"][policy]["summary"][figure] for seed in seeds] for policy in (name, BASELINE)
            )
            mean, half = interval(values)
            difference, half_difference = interval([a - b for a, b in zip(values, baseline, strict=True)])
            policies[name][figure] = {
                "values": values,
                "mean": mean,
                "ci95": half,
                "difference": difference,
                "difference_ci95": half_difference,
            }
    worst_tasks = {
        name: [
            min(tasks, key=lambda task, tasks=tasks: tasks[task]["accuracy"])
            for tasks in (by_seed[seed]["policies"][name]["by_task"] for seed in seeds)
        ]
        for name in STRATEGIES
    }
    return {"seeds": seeds, "baseline": BASELINE, "policies": policies, "worst_tasks": worst_tasks}


def plus_minus(mean: float, half: float | None, sign: str = "") -> str:
    """`0.123 ± 0.045`; without the interval if there is none."""
    return f"{mean:{sign}.3f}" + ("" if half is None else f" ± {half:.3f}")


def markdown(summary: dict[str, Any], steps: int) -> str:
    """The summary as two Markdown tables: figures, and differences to the baseline."""
    lines = ["| | " + " | ".join(FIGURES.values()) + " |", "|---" + "|---:" * len(FIGURES) + "|"]
    for name, figures in summary["policies"].items():
        cells = [plus_minus(figures[figure]["mean"], figures[figure]["ci95"]) for figure in FIGURES]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", f"| difference to {BASELINE} | " + " | ".join(FIGURES.values()) + " |"]
    lines.append("|---" + "|---:" * len(FIGURES) + "|")
    for name in STRATEGIES:
        if name != BASELINE:
            figures = summary["policies"][name]
            cells = [
                plus_minus(figures[figure]["difference"], figures[figure]["difference_ci95"], "+")
                for figure in FIGURES
            ]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    note = (
        f"Held-out pairs, {steps} steps, seeds {summary['seeds']}: mean over seeds ± half of the 95 % confidence interval. "
        "Worst task: the lowest accuracy, the highest excess. Differences are paired by seed."
    )
    return "\n".join([*lines, "", note]) + "\n"


def main() -> None:
    """Run the seeds one after the other; write and print what there is after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds, from 0")
    parser.add_argument("--steps", type=int, help="optimizer steps of every model; the recipe's if not given")
    parser.add_argument("--output_dir", default="outputs/imbalance", help="a folder per seed, and the tables")
    parser.add_argument("--json", help="where to write the figures; <output_dir>/imbalance.json if not given")
    arguments = parser.parse_args()
    output_dir = Path(arguments.output_dir)
    json_path = Path(arguments.json) if arguments.json else output_dir / "imbalance.json"
    by_seed: dict[int, dict[str, Any]] = {}
    for seed in range(arguments.seeds):
        folder = output_dir / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        by_seed[seed] = run_seed(folder, seed, arguments.steps)
        steps = recipe(folder, seed, arguments.steps)["max_steps"]
        summary = {"steps": steps, **summarize(by_seed)}
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        (output_dir / "imbalance.md").write_text(markdown(summary, steps), encoding="utf-8")
    print("\n" + markdown(summary, steps))
    print(f"Figures: {json_path}")


if __name__ == "__main__":
    main()
