"""A run's page, and the page that compares several: one file each, that loads nothing and runs nothing but its own script.

Every text goes through the template engine's escaping; no markup is put together here.
"""

import base64
import functools
import hashlib
import json
import shlex
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..common.errors import AMAError
from ..common.files import remove_abandoned, write_file
from ..common.run_folder import RunFolder
from ..common.versions import __version__
from .charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, chart, look, value_range
from .collect import FIGURES, collect
from .tables import comparison, result_tables


LARGEST = 2_000_000  # bytes of a page, which mail and browsers take easily
_TEMPLATES = Path(__file__).parent / "templates"
_TITLES = {
    "probability": "sampling probability",
    "weight": "weight",
    "excess": "excess loss",
    "clipped_fraction": "clipped fraction",
}
_CONTENTS = (
    ("results", "Results"), ("mixture", "Mixture"), ("specialists", "Specialists"), ("examples", "Examples"),
    ("stages", "Stages"), ("commands", "Commands"), ("configuration", "Configuration"),
)  # fmt: skip
_SEEN = "\n\t\u200c\u200d"  # the last two shape letters and emoji, and do not reorder a text


def write_page(folder: str | Path, path: str | Path | None = None) -> Path:
    """Write the page of a run.

    Args:
        folder (`str` or `Path`): The run's output folder.
        path (`str` or `Path`, *optional*): The page; `report/index.html` in that folder by default.

    Raises:
        AMAError: If the folder holds nothing of a run, or the page cannot be written.
    """
    path = Path(path) if path is not None else RunFolder(folder).page
    return save_page(path, render_run(collect(folder)))


def write_comparison(folders: list[str] | list[Path], path: str | Path) -> Path:
    """Write the page that compares several runs, see [`write_page`]."""
    return save_page(Path(path), render_comparison([collect(folder) for folder in folders]))


def save_page(path: Path, page: str) -> Path:
    """Write a page whole or not at all, and over nothing but a page of ours.

    Raises:
        AMAError: If the file is something else, or cannot be written.
    """
    try:
        # A mistyped name should not cost somebody a file
        if path.exists() and b'<meta name="generator" content="trl-ama' not in path.read_bytes()[:4000]:
            raise AMAError(f"'{path}' is not a page of trl-ama, so it is not overwritten. Choose another name.")
        # Each under a name of its own: jobs that train specialists of one run side by side write its page too
        write_file(path, page.encode())
        remove_abandoned(path, seconds=60)
    except OSError as error:
        raise AMAError(f"The page '{path}' cannot be written ({error.strerror}). Choose another place.") from error
    return path


def render_run(run: dict[str, Any]) -> str:
    """The page of a run.

    Args:
        run (`dict`): What [`collect`] returns.
    """
    limits = {
        figure: value_range(
            [curve for one in run["history"].values() for curve in one["figures"].get(figure, {}).values()]
        )
        for figure in FIGURES
    }
    styles = {task: number for number, task in enumerate(run["tasks"])}

    def strategies(most: int) -> list[dict[str, Any]]:
        blocks = []
        for number, (name, history) in enumerate(run["history"].items()):
            charts = []
            for figure in FIGURES:
                curves = history["figures"].get(figure, {})
                series = [(task, styles[task], history["steps"], values) for task, values in curves.items()]
                if series:
                    title = _TITLES[figure]
                    charts.append(
                        chart(f"chart-{number}-{figure}", title.capitalize(), title, series, limits[figure], most)
                    )
            logged, drawn = len(history["steps"]), min(len(history["steps"]), most)
            thinned = (
                f"The log has {logged} entries; {drawn} of them that show its course are drawn."
                if logged > drawn
                else ""
            )
            blocks.append({"name": name, "charts": charts, "thinned": thinned})
        return blocks

    curves = sum(len(one) for history in run["history"].values() for one in history["figures"].values())
    first = run["results"]["policies"] if run["results"] else {}
    pairs = [
        (task, figures.get("pairs", 0))
        for task, figures in next(iter(first.values()), {"by_task": {}})["by_task"].items()
    ]

    def render(most: int, head: int, longest: int) -> str:
        blocks = strategies(most)
        return _render(
            "report_run.html",
            f"{run['name']}: AutoMixAlign run",
            list(_CONTENTS),
            [one for block in blocks for one in block["charts"]],
            run=run,
            tables=result_tables(run["results"], run["main"]) if run["results"] else [],
            pairs=pairs,
            strategies=blocks,
            legend=[{"name": task, **look(style)} for task, style in styles.items()],
            commands=_commands(run),
            head=head,
            most=longest,
        )

    return _small_enough(render, curves)


def render_comparison(runs: list[dict[str, Any]]) -> str:
    """The page that compares several runs, each as [`collect`] returns it."""
    found = comparison(runs)
    lines = found["lines"]  # label, run, strategy
    tasks = list(dict.fromkeys(task for run in runs for task in run["tasks"]))
    count = sum(len(one) for _, run, name in lines for one in run["history"][name]["figures"].values())

    def figures(most: int) -> list[dict[str, Any]]:
        blocks = []
        for figure in FIGURES:
            limits = value_range(
                [c for _, run, name in lines for c in run["history"][name]["figures"].get(figure, {}).values()]
            )
            charts = []
            for place, task in enumerate(tasks):
                series = []
                for style, (label, run, name) in enumerate(lines):
                    history = run["history"][name]
                    if task in history["figures"].get(figure, {}):
                        series.append((label, style, history["steps"], history["figures"][figure][task]))
                if series:
                    charts.append(chart(f"chart-{figure}-{place}", task, _TITLES[figure], series, limits, most))
            if charts:
                blocks.append({"name": _TITLES[figure].capitalize(), "charts": charts})
        return blocks

    def render(most: int, head: int, longest: int) -> str:
        blocks = figures(most)
        return _render(
            "report_compare.html",
            f"AutoMixAlign: {len(runs)} runs compared",
            [("runs", "Runs"), ("results", "Results"), ("differences", "Settings"), ("mixture", "Mixture")],
            [one for block in blocks for one in block["charts"]],
            figures=blocks,
            legend=[{"name": label, **look(style)} for style, (label, _, _) in enumerate(lines)],
            **{key: value for key, value in found.items() if key != "lines"},
        )

    return _small_enough(render, count)


def _small_enough(render: Callable[[int, int, int], str], curves: int) -> str:
    """The page with as many points a curve and characters a text as `LARGEST` leaves room for."""
    most, head, longest = max(12, min(300, 45_000 // max(curves, 1))), 400, 4000
    while True:
        page = render(most, head, longest)
        if len(page.encode("utf-8")) <= LARGEST or most <= 6:
            return page
        most, head, longest = most // 2, head // 2, longest // 3


@functools.cache
def _environment() -> Any:
    """Compiles each template once: a run writes its page after every stage."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) or not isinstance(value, str) else visible(value),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(fixed=_fixed, signed=_signed, setting=_setting)
    return environment


def _render(
    template: str, title: str, contents: list[tuple[str, str]], charts: list[dict[str, Any]], **values: Any
) -> str:
    style, script = ((_TEMPLATES / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    colours = {line["name"]: line["colour"] for one in charts for line in one["lines"]}
    data = {
        "box": {"left": LEFT, "right": RIGHT, "width": WIDTH},
        "charts": {
            one["id"]: {
                **one["data"],
                "names": [visible(name) for name in one["data"]["names"]],
                "colours": [colours[name] for name in one["data"]["names"]],
            }
            for one in charts
        },
    }
    return _environment().get_template(template).render(
        title=title,
        contents=contents,
        version=__version__,
        # Ours, and put in as they are; the policy in the page's head lets nothing else run
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        chart_data=Markup(script_json(data)),
        WIDTH=WIDTH, HEIGHT=HEIGHT, LEFT=LEFT, RIGHT=RIGHT, TOP=TOP, BOTTOM=BOTTOM,
        **values,
    )  # fmt: skip


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode()


def script_json(value: Any) -> str:
    """JSON that no HTML parser finds the end of a script in."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)  # ASCII
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def visible(text: str) -> str:
    """`text` with characters spelled out that cannot be seen but change what is: direction overrides, controls, halves."""
    if text.isascii() and text.isprintable():
        return text
    text = text.replace("\r\n", "\n")
    return "".join(
        f"⟨U+{ord(character):04X}⟩"
        if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in _SEEN
        else character
        for character in text
    )


def _fixed(value: Any, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}"


def _setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _commands(run: dict[str, Any]) -> list[tuple[str, str]]:
    """Titles and commands to copy."""
    arguments = run["arguments"] or f"--config recipe.yaml --output_dir {shlex.quote(run['place'])}"
    main = run["main"]
    place = run["published"].get("")
    repository = shlex.quote((place or "your-name/your-model").partition("@")[0])
    commands = [
        ("Run again: what is done is skipped, what was stopped goes on", f"trl ama {arguments}"),
        ("Evaluate", f"trl ama-eval {arguments}"),
        ("Write this page again", f"trl ama-report {shlex.quote(run['place'])}"),
        (
            "Push specialists, reference losses and generalist to the Hub",
            f"hf auth login\ntrl ama {arguments} --push_to_hub true --hub_model_id {repository}",
        ),
    ]
    if main is not None:
        # Not joined: without its `./`, a folder's name would be a Hub id
        name, revision = f"{run['place']}/{RunFolder('').generalist(main)}", ""
        if place:
            name, _, revision = place.partition("@")
        library, kind = (
            ("peft", "AutoPeftModelForCausalLM") if run["adapter"] else ("transformers", "AutoModelForCausalLM")
        )
        reader, thing = "AutoTokenizer", "tokenizer"
        if run["takes_images"]:
            library, kind, reader, thing = "transformers", "AutoModelForImageTextToText", "AutoProcessor", "processor"
        where = json.dumps(name, ensure_ascii=False) + (f", revision={json.dumps(revision)}" if revision else "")
        lines = [
            f"from {library} import {kind}",
            f"from transformers import {reader}",
            "",
            f"model = {kind}.from_pretrained({where})",
            f"{thing} = {reader}.from_pretrained({where})",
        ]
        commands.append(("Load in Python", "\n".join(lines)))
    return commands
