"""Docstrings in the Hugging Face style, as Markdown that Sphinx cross-references. Text in, text out; no Sphinx here."""

import re
from collections.abc import Callable
from inspect import cleandoc


_REFERENCE = re.compile(r"\[`(~?)([A-Za-z_][\w.]*)`\]")
_SECTION = re.compile(r"(Parameters|Args|Attributes|Returns|Raises|Yields|Examples?):")
# `name (`type`, *optional*):`, `first, second:` or `AMAError: If …`
_ENTRY = re.compile(r"(?P<names>\*{0,2}\w[\w.]*(?:, \*{0,2}\w+)*)(?: \((?P<type>.*?)\))?:(?: (?P<text>.*))?")
_SHAPE = re.compile(r"\s# (\(.*\).*|.*\brows)$")
_TITLES = {"Args": "Parameters", "Example": "Example", "Examples": "Examples"}


def to_markdown(docstring: str, link: Callable[[str, bool], str]) -> str:
    """
    Rewrite a docstring as Markdown.

    Args:
        docstring (`str`):
            As it stands in the source.
        link (`Callable`):
            Given a name out of [`name`] and whether only its last part is to be shown (`~`), returns its Markdown.

    Returns:
        `str`: The text, with a title for each section and a definition list of its entries.
    """
    lines = cleandoc(docstring).splitlines()
    result: list[str] = []
    index = 0
    while index < len(lines):
        section = _SECTION.fullmatch(lines[index])
        if section is None:
            if lines[index].lstrip().startswith("```"):  # as it is, to the end of the fence
                end = next(n for n in range(index + 1, len(lines)) if lines[n].strip() == "```")
                result += lines[index : end + 1]
                index = end + 1
                continue
            result.append(_text(lines[index], link))
            index += 1
            continue
        end = index + 1
        while end < len(lines) and (not lines[end].strip() or lines[end].startswith(" ")):
            end += 1
        name = section.group(1)
        body = cleandoc("\n".join(["", *lines[index + 1 : end]])).splitlines()
        result += ["", f"**{_TITLES.get(name, name)}**", ""]
        if name in ("Returns", "Yields"):
            result.append(_text(" ".join(line.strip() for line in body), link))
        elif name == "Raises":
            result += definitions([(link(error, True), "", text) for error, _, text in entries(body)], link)
        elif name.startswith("Example"):
            result += body
        else:
            result += definitions([(f"`{names}`", kind, text) for names, kind, text in entries(body)], link)
        result.append("")
        index = end
    return "\n".join(result).strip() + "\n"


def entries(body: list[str]) -> list[tuple[str, str, str]]:
    """Names, type and text of each entry of a section; what follows a name is indented.

    Raises:
        ValueError: If a line is neither an entry nor indented below one.
    """
    found: list[list[str]] = []
    for line in body:
        match = _ENTRY.fullmatch(line)
        if match is not None:
            found.append([match["names"], match["type"] or "", match["text"] or ""])
        elif not line.strip() or (found and line.startswith(" ")):
            if found:
                found[-1][2] += " " + line.strip()
        else:
            raise ValueError(f"not an entry of a docstring's section: {line!r}")
    return [(names, kind, text.strip()) for names, kind, text in found]


def parameters(docstring: str) -> dict[str, tuple[str, str]]:
    """Type and text of each documented parameter; of `a, b:` both have the same."""
    lines = cleandoc(docstring).splitlines()
    begin = next((n for n, line in enumerate(lines) if line in ("Parameters:", "Args:")), len(lines)) + 1
    end = begin
    while end < len(lines) and (not lines[end].strip() or lines[end].startswith(" ")):
        end += 1
    found = entries(cleandoc("\n".join(["", *lines[begin:end]])).splitlines())
    return {name: (kind, text) for names, kind, text in found for name in names.split(", ")}


def definitions(rows: list[tuple[str, str, str]], link: Callable[[str, bool], str]) -> list[str]:
    """A definition list in MyST's Markdown: term, type and text of each row."""
    lines = []
    for term, kind, text in rows:
        lines += [f"{term} ({_text(kind, link)})" if kind else term, f": {_text(text, link) or '…'}", ""]
    return lines


def _text(line: str, link: Callable[[str, bool], str]) -> str:
    line = _SHAPE.sub(r" *\1*", line)
    return _REFERENCE.sub(lambda match: link(match[2], bool(match[1])), line)


def references(docstring: str) -> list[str]:
    """The names that a docstring refers to."""
    return [name for _, name in _REFERENCE.findall(docstring)]
