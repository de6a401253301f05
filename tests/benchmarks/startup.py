"""What trl-ama adds to the start of Python, of `import trl` and of `trl … --help`, in alternating pairs of processes.

    python tests/benchmarks/startup.py

The first comparison is of two bare environments, one of which has the files of the start-up hook: what a process that is
not `trl` pays for it. With `--hook-only` it is the only one, and a Python without TRL can run it. What the line in the `.pth` file
takes is also measured from within, where starting a process does not hide it.

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
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


REPO = Path(__file__).resolve().parents[2]
HOOK = ("trl_ama_register.pth", "trl_ama_register.py", "trl_ama_register.start")
HELP = """
import trl_ama_register
trl_ama_register.install()
from trl.cli import main
raise SystemExit(main([{command!r}, "--help"]))
"""
COMMANDS = ("ama", "ama-specialists", "ama-losses", "ama-eval", "ama-check")


def help_of(command: str) -> list[str]:
    """Arguments of Python that run `trl <command> --help`."""
    return [sys.executable, "-c", HELP.format(command=command)]


def bare_python(path: Path, hook: bool) -> list[str]:
    """A Python of its own that does nothing, in an environment that has the hook's files or has nothing."""
    venv.create(path, with_pip=False, symlinks=True)
    site_packages = next((path / "lib").glob("python*/site-packages"))
    for name in HOOK if hook else ():
        shutil.copy(REPO / name, site_packages)
    return [str(path / "bin" / "python"), "-c", "pass"]


def line_cost(times: int) -> list[float]:
    """Quartiles of the milliseconds in which Python reads and runs the hook's line, each time in a fresh process."""
    code = f"import site, time; start = time.perf_counter(); site.addpackage({str(REPO)!r}, {HOOK[0]!r}, set()); "
    command = [sys.executable, "-I", "-c", code + "print(time.perf_counter() - start)"]
    seconds = [float(subprocess.run(command, capture_output=True, text=True).stdout) for _ in range(times)]
    return statistics.quantiles([1e3 * value for value in seconds], n=4)


def run(arguments: list[str], environ: dict[str, str]) -> dict[str, float]:
    """Seconds of processor and of time that a fresh process takes."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    # From elsewhere: `-c` puts the current folder on the path, where finding modules may cost more or less
    result = subprocess.run(arguments, env=environ, cwd=tempfile.gettempdir(), capture_output=True, text=True)
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
        f"{result['hook_pairs']} pairs of bare processes, {result['pairs']} of each import, {result['help_pairs']} of each help "
        f"text; medians, in ms. Python {result['python']}, TRL {result['trl']}. The hook's line takes "
        f"{result['line'][1]:.2f} ms (quartiles {result['line'][0]:.2f} and {result['line'][2]:.2f}).",
        "",
        "| ours | against | CPU: ours | theirs | difference (quartiles) | ratio | elapsed: difference | ratio |",
        "| --- | --- " + "| ---: " * 6 + "|",
    ]
    for entry in result["comparisons"]:
        cpu, wall = entry["cpu"], entry["wall"]
        spread = " to ".join(f"{value:+.2f}" for value in cpu["difference_iqr"] or [])
        lines.append(
            f"| `{entry['ours']}` | `{entry['theirs']}` | {cpu['ours']:.1f} | {cpu['theirs']:.1f} | "
            f"{cpu['difference']:+.2f} ({spread}) | {cpu['ratio']:.3f} | {wall['difference']:+.2f} | {wall['ratio']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"))
    parser.add_argument(
        "--hook-only", action="store_true", help="compare bare environments with and without the hook only"
    )
    parser.add_argument("--hook-pairs", type=int, default=200, help="of `python -c pass`")
    parser.add_argument("--pairs", type=int, default=40, help="of each import")
    parser.add_argument("--help-pairs", type=int, default=20, help="of each help text, which takes seconds")
    parser.add_argument("--commands", nargs="*", default=list(COMMANDS), choices=COMMANDS)
    options = parser.parse_args()
    # Byte code is kept, as it is of an installed package; it would otherwise be ours alone that is compiled each time
    bare = {key: value for key, value in os.environ.items() if key not in ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH")}
    environ = {**bare, "PYTHONPATH": str(REPO), "HF_HUB_DISABLE_TELEMETRY": "1"}
    wanted = [
        ("import trl, trl_ama", "import trl", options.pairs),
        ("import trl_ama", "import trl", options.pairs),
        ("import trl_ama", "pass", options.pairs),
    ]
    python = [sys.executable, "-c"]
    cases = [
        (f"python -c '{a}'", f"python -c '{b}'", [*python, a], [*python, b], count, environ) for a, b, count in wanted
    ]
    cases += [
        (f"trl {command} --help", "trl dpo --help", help_of(command), help_of("dpo"), options.help_pairs, environ)
        for command in options.commands
    ]
    result = {
        "python": platform.python_version(),
        "trl": installed_version("trl"),
        "hook_pairs": options.hook_pairs,
        "pairs": options.pairs,
        "help_pairs": options.help_pairs,
        "line": line_cost(max(2, options.hook_pairs // 2)),
        "comparisons": [],
    }
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="trl_ama_startup_") as folder:
        pythons = [bare_python(Path(folder, str(hook)), hook) for hook in (True, False)]
        hook_case = ("python -c 'pass', with the hook", "without", *pythons, options.hook_pairs, bare)
        for ours_name, theirs_name, *rest in [hook_case] if options.hook_only else [hook_case, *cases]:
            result["comparisons"].append({"ours": ours_name, "theirs": theirs_name, **compare(*rest)})
            (options.output / "startup.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.output / "startup.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
