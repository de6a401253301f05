"""What trl-ama adds to the start of Python, of `import trl` and of `trl … --help`, in alternating pairs of processes.

    python tests/benchmarks/startup.py

Each figure is the median of the differences within pairs, whose order is turned around every time. Processor time (user
and system, of the child) is what counts on a machine that others use; elapsed time stands beside it. The commands run as
`trl` runs them, of this source tree, with the start-up hook whether or not the package is installed. Writes `startup.json`
and `startup.md` into `--output`.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path


REPO = Path(__file__).resolve().parents[2]
HELP = """
import sys
if not any(type(finder).__name__ == "TRLAMAFinder" for finder in sys.meta_path):
    exec(open({hook!r}).read())
from trl.cli import main
raise SystemExit(main([{command!r}, "--help"]))
"""
COMMANDS = ("ama", "ama-specialists", "ama-losses", "ama-eval", "ama-check")


def help_of(command: str) -> list[str]:
    """Arguments of Python that run `trl <command> --help`."""
    return ["-c", HELP.format(hook=str(REPO / "trl_ama_register.pth"), command=command)]


def run(arguments: list[str], environ: dict[str, str]) -> dict[str, float]:
    """Seconds of processor and of time that a fresh Python takes."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    # From elsewhere: `-c` puts the current folder on the path, where finding modules may cost more or less
    result = subprocess.run(
        [sys.executable, *arguments], env=environ, cwd=tempfile.gettempdir(), capture_output=True, text=True
    )
    elapsed, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if result.returncode != 0:
        raise SystemExit(f"{arguments} failed:\n{result.stderr}")
    return {"cpu": after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, "wall": elapsed}


def compare(ours: list[str], theirs: list[str], pairs: int, environ: dict[str, str]) -> dict[str, dict[str, float]]:
    """Medians of both, of their differences and of their ratios, in milliseconds."""
    seen = {"ours": [], "theirs": []}
    for number in range(-1, pairs):  # the first pair warms up: byte code and the file system's cache
        sides = [("ours", ours), ("theirs", theirs)]
        for side, arguments in sides if number % 2 else sides[::-1]:
            measured = run(arguments, environ)
            if number >= 0:
                seen[side].append(measured)
    figures = {}
    for clock in ("cpu", "wall"):
        mine, other = ([1e3 * measured[clock] for measured in seen[side]] for side in ("ours", "theirs"))
        differences = [a - b for a, b in zip(mine, other, strict=True)]
        figures[clock] = {
            "ours": statistics.median(mine),
            "theirs": statistics.median(other),
            "difference": statistics.median(differences),
            "difference_iqr": list(statistics.quantiles(differences, n=4)[::2]) if pairs > 1 else None,
            "ratio": statistics.median(a / b for a, b in zip(mine, other, strict=True)),
        }
    return figures


def table(result: dict) -> str:
    """The result as Markdown."""
    lines = [
        f"{result['pairs']} pairs each ({result['help_pairs']} of the help texts); medians, in ms. Python "
        f"{result['python']}, TRL {result['trl']}.",
        "",
        "| ours | against | CPU: ours | theirs | difference (quartiles) | ratio | elapsed: difference | ratio |",
        "| --- | --- " + "| ---: " * 6 + "|",
    ]
    for entry in result["comparisons"]:
        cpu, wall = entry["cpu"], entry["wall"]
        spread = " to ".join(f"{value:+.1f}" for value in cpu["difference_iqr"] or [])
        lines.append(
            f"| `{entry['ours']}` | `{entry['theirs']}` | {cpu['ours']:.1f} | {cpu['theirs']:.1f} | "
            f"{cpu['difference']:+.1f} ({spread}) | {cpu['ratio']:.3f} | {wall['difference']:+.1f} | {wall['ratio']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"))
    parser.add_argument("--pairs", type=int, default=40, help="of each import")
    parser.add_argument("--help-pairs", type=int, default=20, help="of each help text, which takes seconds")
    parser.add_argument("--commands", nargs="*", default=list(COMMANDS), choices=COMMANDS)
    options = parser.parse_args()
    # Byte code is kept, as it is of an installed package; it would otherwise be ours alone that is compiled each time
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environ |= {"PYTHONPATH": str(REPO), "HF_HUB_DISABLE_TELEMETRY": "1"}
    wanted = [
        ("import trl, trl_ama", "import trl", options.pairs),
        ("import trl_ama", "import trl", options.pairs),
        ("import trl_ama", "pass", options.pairs),
    ]
    cases = [(f"python -c '{a}'", f"python -c '{b}'", ["-c", a], ["-c", b], count) for a, b, count in wanted]
    cases += [
        (f"trl {command} --help", "trl dpo --help", help_of(command), help_of("dpo"), options.help_pairs)
        for command in options.commands
    ]
    result = {
        "python": platform.python_version(),
        "trl": version("trl"),
        "pairs": options.pairs,
        "help_pairs": options.help_pairs,
        "comparisons": [],
    }
    options.output.mkdir(parents=True, exist_ok=True)
    for ours_name, theirs_name, ours, theirs, count in cases:
        result["comparisons"].append(
            {"ours": ours_name, "theirs": theirs_name, **compare(ours, theirs, count, environ)}
        )
        (options.output / "startup.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.output / "startup.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
