"""Everything that we want to know of a card, in 8 minutes: `make gpu`. Needs one card with 24 GB, and no network.

    python tests/benchmarks/gpu/run.py --output outputs/gpu
    python tests/benchmarks/gpu/run.py --rehearse                     # on a CPU, with tiny models: whether all of it runs
    python tests/benchmarks/gpu/run.py --parts steps-8B memory        # some of it
    python tests/benchmarks/gpu/run.py --from a100.json 4090.json --docs docs/speed.md    # figures that were sent, into the docs

Each part is a process of its own with a time of its own, so what one dies of is told in the table and leaves the rest alone. Models
have random weights, pairs are made up; their shapes are in the table. `gpu.json` and `gpu.md` are written after every part. The exit
code is 1 if a mark was missed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_marks import judge
from gpu_parts import LIMIT, PARTS
from gpu_report import without_home
from gpu_tables import insert, section, tables, title


HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
LEAST = 10  # seconds; with less left a part is not begun


def environment(rehearse: bool) -> dict[str, str]:
    """Of every part: no network, one card, and this repository whether it is installed or not."""
    found = dict(os.environ)
    found |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    found["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), found.get("PYTHONPATH")]))
    # With several cards in sight a single process would split batches over them
    found["CUDA_VISIBLE_DEVICES"] = "" if rehearse else found.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    if rehearse:
        found.setdefault("OMP_NUM_THREADS", "1")
    return found


def command(name: str, file: Path, seconds: float, rehearse: bool) -> list[str]:
    """What starts a part."""
    found = [str(HERE / "worker.py"), name, str(file), str(seconds), *(["--rehearse"] if rehearse else [])]
    if PARTS[name].launched:
        config = ROOT / "recipes" / "accelerate_configs" / ("single_gpu.yaml" if rehearse else "fsdp2.yaml")
        launch = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", "1"]
        found = [*launch, *(["--cpu"] if rehearse else []), *found]
    return [sys.executable, *found]


def run_part(arguments: list[str], file: Path, seconds: float, variables: dict[str, str]) -> dict[str, Any]:
    """Run one part and return what it has found, however it ended. What it prints goes into a file beside the JSON."""
    file.unlink(missing_ok=True)
    start, code = time.monotonic(), None
    with open(file.with_suffix(".log"), "w") as log:
        process = subprocess.Popen(arguments, stdout=log, stderr=log, cwd=ROOT, env=variables, start_new_session=True)
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if code is None:  # its children too
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    found = json.loads(file.read_text()) if file.exists() else {"status": "running", "rows": [], "notes": {}}
    if found["status"] == "running":
        printed = file.with_suffix(".log").read_text(errors="replace").strip().splitlines()
        last = printed[-1] if printed else "nothing was printed"
        died = f"ended by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        why = without_home(
            f"not done after {seconds:.0f} s" if code is None else f"{died}; its last line: {last[:200]}"
        )
        found |= {"status": "failed", "why": why}
    return {**found, "seconds": round(time.monotonic() - start, 1)}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the parts one after the other, each for at most its time and all for at most the limit."""
    options.output.mkdir(parents=True, exist_ok=True)
    start, variables = time.monotonic(), environment(options.rehearse)
    result: dict[str, Any] = {"rehearsal": options.rehearse, "parts": {}, "marks": []}
    names = list(dict.fromkeys(["env", *options.parts]))
    for number, name in enumerate(names):
        left = start + options.limit - time.monotonic()
        # Its own time, and what those before have not used
        own, later = (
            sum(PARTS[one].seconds * options.patience for one in some) for some in ([name], names[number + 1 :])
        )
        seconds = min(left, max(own, left - later))
        if seconds < LEAST:
            result["parts"][name] = {"status": "not begun", "why": "no time was left", "rows": [], "notes": {}}
        else:
            file = options.output / f"{name}.json"
            # A part ends itself a little before it is ended, so that what it has is whole
            arguments = command(name, file, max(seconds - 4, 0.9 * seconds), options.rehearse)
            result["parts"][name] = run_part(arguments, file, seconds, variables)
        part = result["parts"][name]
        print(f"{name}: {part['status']} {part.get('why', '')} ({part.get('seconds', 0):.0f} s)", flush=True)
        save(result, options.output)
        if name == "env" and part["status"] == "skipped":
            break
    return result


def save(result: dict[str, Any], folder: Path) -> None:
    result["marks"] = judge(result["parts"], result["rehearsal"])
    (folder / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "gpu.md").write_text(f"# {title(result)}\n\n" + "\n".join(tables(result)) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu"))
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument(
        "--rehearse", action="store_true", help="on a CPU, with tiny models; time and memory do not count"
    )
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for all parts together")
    parser.add_argument(
        "--patience", type=float, default=1.0, help="times the seconds of each part, on a slow machine"
    )
    parser.add_argument("--from", dest="files", type=Path, nargs="+", help="gpu.json of earlier runs; nothing is run")
    parser.add_argument("--docs", type=Path, help="a page whose marked section is replaced by the figures")
    options = parser.parse_args()
    if options.files:
        results = [json.loads(file.read_text()) for file in options.files]
        for result in results:  # by the marks of today
            result["marks"] = judge(result["parts"], result["rehearsal"])
    else:
        results = [measure(options)]
        env = results[0]["parts"]["env"]
        if env["status"] == "skipped":
            print(f"Skipped: {env['why']}. See docs/contributing.md for what a card needs; --rehearse runs on a CPU.")
            return 0
    for result in results:
        print(f"\n# {title(result)}\n\n" + "\n".join(tables(result)))
    if options.docs:
        if any(result["rehearsal"] for result in results):
            raise SystemExit("A rehearsal has no figures for the docs.")
        insert(options.docs, section(results))
    return 0 if all(mark["met"] for result in results for mark in result["marks"]) else 1


if __name__ == "__main__":
    sys.exit(main())
