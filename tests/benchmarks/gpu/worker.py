"""One part of `make gpu`, in this process; `run.py` starts it.

python tests/benchmarks/gpu/worker.py PART FILE.json SECONDS [--rehearse]
"""

import argparse
import sys
import traceback
from importlib import import_module
from pathlib import Path

from gpu_parts import PARTS
from gpu_report import NotHere, Report, in_a_line


ROOT = Path(__file__).resolve().parents[3]
sys.path += [str(ROOT), str(ROOT / "tests" / "support"), str(ROOT / "tests" / "benchmarks")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("file", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    part, report = PARTS[options.part], Report(options.file, options.seconds, options.rehearse)
    module, _, function = part.function.partition(".")
    try:
        getattr(import_module(module), function)(report, *part.arguments)
    except NotHere as reason:
        report.end("skipped", str(reason))
    except Exception as error:
        traceback.print_exc()
        report.end("failed", in_a_line(error))
    else:
        report.end("done")


if __name__ == "__main__":
    main()
