"""How long it takes until a mistake in a recipe is told: whole processes, from their start to their exit code 2.

    python tests/benchmarks/mistakes.py                 # this source tree
    python tests/benchmarks/mistakes.py --tree ../old   # another, to compare with

Each figure is a median of `--runs`. Processor time (user and system, of the child) is what counts on a machine that others
use; elapsed time stands beside it. `trl` needs an installed package, for its start-up hook.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


REPO = Path(__file__).resolve().parents[2]
BASE = "model_name_or_path: x\noutput_dir: out\nuse_cpu: true\nbf16: false\n"
TASKS = "tasks:\n  - {task: a, path: org/a}\n  - {task: b, path: org/b}\n"
MISTAKES = {
    "unknown key": BASE + TASKS + "learning_rat: 1.0e-4\n",
    "wrong type": BASE + TASKS + "learning_rate: fast\n",
    "two tasks alike": BASE + TASKS.replace("task: b", "task: a"),
    "no tasks": BASE,
    "missing file": BASE + "tasks:\n  - {task: a, path: json, data_files: no.jsonl}\n",
}
PROGRAMS = {
    "trl-ama": [sys.executable, "-m", "trl_ama"],
    "trl": [str(Path(sys.executable).with_name("trl"))],
}


def seconds(arguments: list[str], folder: str, environ: dict[str, str]) -> tuple[float, float]:
    """Processor time and elapsed time of a process that has to end with exit code 2 and one sentence."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    result = subprocess.run(arguments, env=environ, cwd=folder, capture_output=True, text=True)
    elapsed, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if result.returncode != 2 or not result.stderr.splitlines()[-1].startswith("trl ama: error:"):
        raise SystemExit(f"{arguments} ended with {result.returncode}:\n{result.stderr}")
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=REPO, help="source tree to run")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--mistakes", nargs="*", default=list(MISTAKES), choices=MISTAKES)
    parser.add_argument("--programs", nargs="*", default=list(PROGRAMS), choices=PROGRAMS)
    options = parser.parse_args()
    # Byte code is kept, as it is of an installed package
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environ |= {"PYTHONPATH": str(options.tree.resolve()), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    print("| mistake | program | CPU, s | elapsed, s |\n| --- | --- | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "recipe.yaml").touch()
        for mistake in options.mistakes:
            Path(folder, "recipe.yaml").write_text(MISTAKES[mistake], encoding="utf-8")
            for program in options.programs:
                arguments = [*PROGRAMS[program], "ama", "--config", "recipe.yaml"]
                seconds(arguments, folder, environ)  # warms up: byte code and the file system's cache
                measured = [seconds(arguments, folder, environ) for _ in range(options.runs)]
                cpu, elapsed = map(statistics.median, zip(*measured, strict=True))
                print(f"| {mistake} | `{program}` | {cpu:.2f} | {elapsed:.2f} |", flush=True)


if __name__ == "__main__":
    main()
