"""What `make gpu` has found, as Markdown, and the section of `docs/speed.md` that takes it in."""

import re
from pathlib import Path
from typing import Any

from gpu_parts import PARTS


BEGIN, END = "<!-- begin: make gpu -->", "<!-- end: make gpu -->"
_HIDDEN = {"way"}  # said by the case already


def section(results: list[dict[str, Any]]) -> str:
    """Of the results from all cards: their tables, and what has not run on any. Without results, that nothing has."""
    lines = []
    if not results:
        lines += [
            "None has: no line of this repository has run on a card so far, and no figure here is from one.",
            "",
        ]
    for result in results:
        lines += [f"### {title(result)}", "", *tables(result), ""]
    ran = {name for result in results for name, part in result["parts"].items() if part["status"] == "done"}
    missing = [name for name in PARTS if name not in ran]
    if missing:
        lines += [
            "Never run on a card:",
            "",
            "| part of `make gpu` | what it measures | what it is the first to run on a card |",
        ]
        lines += ["| --- | --- | --- |"]
        lines += [f"| `{name}` | {PARTS[name].title} | {PARTS[name].first} |" for name in missing]
    return "\n".join(lines).strip() + "\n"


def title(result: dict[str, Any]) -> str:
    """The card, its memory, and the versions of what matters most."""
    notes = result["parts"].get("env", {}).get("notes", {})
    versions = notes.get("versions", {})
    card = notes.get("card") or ("a rehearsal on a CPU" if result["rehearsal"] else "an unknown card")
    gib = f", {notes['gib']} GiB" if "gib" in notes else ""
    known = [f"{name} {versions[name]}" for name in ("torch", "cuda", "trl", "transformers") if versions.get(name)]
    return f"{card}{gib} ({', '.join(known)})" if known else f"{card}{gib}"


def tables(result: dict[str, Any]) -> list[str]:
    """The marks that were missed, then a table of every part."""
    missed = [mark for mark in result["marks"] if not mark["met"]]
    lines = [f"{len(result['marks']) - len(missed)} of {len(result['marks'])} marks are met."]
    if missed:
        lines += ["", "| missed | part | case | found | wanted |", "| --- | --- | --- | --- | --- |"]
        lines += [_row(mark[key] for key in ("mark", "part", "case", "value", "limit")) for mark in missed]
    for name, part in result["parts"].items():
        took = f" ({part['seconds']:.0f} s)" if "seconds" in part else ""
        lines += ["", f"**`{name}`: {PARTS[name].title}**{took}"]
        if part["status"] != "done":
            lines[-1] += f" — {part['status']}{': ' + part['why'] if part.get('why') else ''}"
        rows = [{key: value for key, value in row.items() if key not in _HIDDEN} for row in part.get("rows", [])]
        if rows:
            columns = list(dict.fromkeys(key for row in rows for key in row))
            numbers = {key for key in columns if any(isinstance(row.get(key), (int, float)) for row in rows)}
            lines += ["", _row(columns), _row("---:" if key in numbers else "---" for key in columns)]
            lines += [_row(row.get(key) for key in columns) for row in rows]
    return lines


def _row(values) -> str:
    return f"| {' | '.join(map(_shown, values))} |"


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if value == 0 or 1e-3 <= abs(value) < 1e6:
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        return f"{value:.1e}"
    return str(value).replace("|", "/").replace("\n", " ")


def insert(page: Path, text: str) -> None:
    """Replace what stands between the two marks of a page."""
    old = page.read_text(encoding="utf-8")
    if old.count(BEGIN) != 1 or old.count(END) != 1:
        raise SystemExit(f"{page} must have the lines '{BEGIN}' and '{END}' once each.")
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    page.write_text(pattern.sub(lambda _: f"{BEGIN}\n\n{text}\n{END}", old), encoding="utf-8")
