"""
# The page of a run, as `report/index.html` in its folder; the run may be in progress:
```bash
trl ama-report outputs/mine
```

# Several runs on one page:
```bash
trl ama-report outputs/first outputs/second --output comparison.html
```
"""

import argparse
import sys
from pathlib import Path


COMPARISON = "ama-comparison.html"


def run_without_recipe(argv: list[str]) -> int:
    """Write the page; neither a model nor `accelerate launch` is needed."""
    from trl_ama.common.errors import AMAError
    from trl_ama.common.run_folder import RunFolder
    from trl_ama.report.collect import collect
    from trl_ama.report.page import render_comparison, render_run, save_page
    from trl_ama.report.tables import reservations

    args = make_parser(prog="trl ama-report").parse_args(argv)
    if args.output is not None and Path(args.output).suffix.lower() not in (".html", ".htm"):
        raise AMAError(f"--output is '{args.output}', but the page is HTML. Give a name that ends in .html.")
    if len({Path(folder).resolve() for folder in args.folders}) < len(args.folders):
        raise AMAError(f"A folder is named twice in {args.folders}. Name every run once.")
    runs = [collect(folder) for folder in args.folders]
    if len(runs) == 1:
        page, missing = render_run(runs[0]), runs[0]["missing"]
        path = RunFolder(args.folders[0]).page
    else:
        page, missing = render_comparison(runs), reservations(runs)
        path = Path(COMPARISON)
    path = save_page(Path(args.output or path), page)
    for sentence in missing:  # the page says so too, but whoever passes it on may not have looked
        print(f"Note: {sentence}", file=sys.stderr)
    print(f"Page: {path}")
    return 0


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None):
    """Return the parser of `trl ama-report`."""
    from trl_ama.scripts import COMMANDS

    text = COMMANDS["ama-report"]
    if subparsers is not None:
        parser = subparsers.add_parser("ama-report", help=text)
    else:
        parser = argparse.ArgumentParser(prog=prog, description=text, allow_abbrev=False)
    parser.add_argument("folders", nargs="+", metavar="DIR", help="Output folder of a run; several are compared.")
    parser.add_argument(
        "--output",
        help=f"The page. Default: report/index.html in the run's folder, or {COMPARISON} here for several.",
    )
    return parser


if __name__ == "__main__":
    from trl_ama.scripts.common import report_errors

    with report_errors("ama-report"):
        raise SystemExit(run_without_recipe(sys.argv[1:]))
