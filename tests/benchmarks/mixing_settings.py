"""What `mixing_lr`, `smoothing` and `excess_clip` do: the imbalance case with one setting at a time changed from its default.

Material, specialists and reference losses of each seed are those of `imbalance.py`; every variant trains a generalist on them
and is held against the default of its strategy, paired by seed. What was done before is not done again.

    python tests/benchmarks/mixing_settings.py --seeds 5 --output_dir outputs/imbalance
    python tests/benchmarks/mixing_settings.py --seeds 5 --steps 60 --output_dir outputs/imbalance-60

With the recipe's 200 steps every task is learned in the end; fewer `--steps` (in a folder of their own) show who is late.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from imbalance import FIGURES, interval, plus_minus, recipe, run_seed


FACTORS = (1 / 16, 1 / 4, 4, 16)  # of the regret bound's step size
SMOOTHINGS = (0.0, 0.05, 0.3, 0.6)
CLIPS = ("task", "none")


def auto_lr(strategy: str, num_tasks: int, steps: int) -> float:
    """What `mixing_lr: auto` is in a run of so many steps."""
    from trl_ama.mixing import build_strategy

    built = build_strategy(strategy, np.ones(num_tasks))
    built.set_horizon(steps, math.log(2))
    return built.mixing_lr


def variants(num_tasks: int, steps: int) -> dict[str, dict[str, Any]]:
    """Name → the keys that it changes in the recipe."""
    result = {}
    for strategy in ("ama_s", "ama_r"):
        auto = auto_lr(strategy, num_tasks, steps)
        result[strategy] = {"mixing": strategy}
        for factor in FACTORS:
            name = f"{strategy}, mixing_lr {f'× {factor:g}' if factor > 1 else f'/ {1 / factor:g}'}"
            result[name] = {"mixing": strategy, "mixing_lr": auto * factor}
        for smoothing in SMOOTHINGS if strategy == "ama_s" else ():
            result[f"{strategy}, smoothing {smoothing:g}"] = {"mixing": strategy, "smoothing": smoothing}
        for clip in CLIPS:
            result[f"{strategy}, excess_clip {clip}"] = {"mixing": strategy, "excess_clip": clip}
    return result


def run_variant(folder: Path, number: int, values: dict[str, Any]) -> dict[str, float]:
    """Train and evaluate a variant on a seed's reference losses; return the summary of its held-out figures."""
    from trl_ama.pipeline.run import run_pipeline
    from trl_ama.scripts.common import make_parser, parse_arguments

    output = folder / "settings" / f"{number:02d}"
    results = output / "results.json"
    if not results.is_file():
        changes = {
            "output_dir": str(output),
            "compare": [],
            "reference_losses": str(folder / "run" / "reference_losses"),
        }
        config = output / "config.yaml"
        config.parent.mkdir(parents=True, exist_ok=True)
        import yaml

        given = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        config.write_text(yaml.safe_dump({**given, **changes, **values}, sort_keys=False), encoding="utf-8")
        run_pipeline(
            *parse_arguments(make_parser("ama", prog="settings"), ["--config", str(config)]), stages=("train", "eval")
        )
    return json.loads(results.read_text(encoding="utf-8"))["policies"][values["mixing"]]["summary"]


def markdown(found: dict[str, list[dict[str, float]]]) -> str:
    """A row per variant: figures, and the difference in the worst task's to the default of its strategy."""
    seeds = min(map(len, found.values()))
    lines = [
        "| | " + " | ".join(FIGURES.values()) + " | worst-task excess − default's |",
        "| --- " + "| ---: " * 4 + "|",
    ]
    for name, summaries in found.items():
        default = found[name.split(",")[0]]
        cells = [plus_minus(*interval([entry[figure] for entry in summaries[:seeds]])) for figure in FIGURES]
        pairs = zip(summaries[:seeds], default[:seeds], strict=True)
        difference = interval([ours["worst_excess"] - theirs["worst_excess"] for ours, theirs in pairs])
        cells.append("" if name == name.split(",")[0] else plus_minus(*difference, "+"))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + f"\n\n{seeds} seeds: mean ± half of the 95 % confidence interval.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds, from 0")
    parser.add_argument("--steps", type=int, help="optimizer steps of a generalist; the recipe's by default")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/imbalance"), help="the one of imbalance.py")
    options = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(options.seeds):
        folder = options.output_dir / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        run_seed(folder, seed, options.steps)
        given = recipe(folder, seed, options.steps)
        for number, (name, values) in enumerate(variants(len(given["tasks"]), given["max_steps"]).items()):
            print(f"seed {seed}: {name}", flush=True)
            found.setdefault(name, []).append(run_variant(folder, number, values))
        text = markdown(found)
        (options.output_dir / "mixing_settings.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        (options.output_dir / "mixing_settings.md").write_text(text, encoding="utf-8")
    print("\n" + text)


if __name__ == "__main__":
    main()
