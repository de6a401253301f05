"""Text of any origin as Markdown that says what the text says, and nothing else."""

import re


# An underscore within a word is one; elsewhere it may begin an emphasis
_SPECIAL = re.compile(r"[\\`*{}\[\]()#+!|<>~&$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
_ADDRESS = re.compile(r"(?i)(?<=\bww)w(?=\.)|:(?=//)|@")  # what GitHub's Markdown makes links of by itself
_MARKER = "<!-- trl-ama: "


def _one_line(text: str) -> str:
    """`text` in one line, without characters that cannot be seen or written."""
    line = " ".join(str(text).split())
    return "".join(character if character.isprintable() else "\ufffd" for character in line)


def escape(text: str) -> str:
    """`text` in one line of prose or a table cell, with nothing in it that Markdown or HTML would act upon."""
    line = _SPECIAL.sub(lambda match: _ENTITIES.get(match[0], "\\" + match[0]), _one_line(text))
    return _ADDRESS.sub(lambda match: f"&#{ord(match[0])};", line)


def code(text: str) -> str:
    """`text` as a code span, also in a table cell."""
    line = _one_line(text).replace("|", "¦")
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    return f"{ticks} {line} {ticks}" if "`" in line or not line else f"{ticks}{line}{ticks}"


def fence(text: str, language: str = "") -> str:
    """`text` as a code block that no line of it can end."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text.strip()}\n{ticks}"


def table(rows: list[list[str]], numbers: int | None = None) -> str:
    """A table of cells that are Markdown already.

    Args:
        rows (`list[list[str]]`): The first one is the head.
        numbers (`int`, *optional*): How many of the last columns hold numbers, aligned right; all but the first by default.
    """
    numbers = len(rows[0]) - 1 if numbers is None else numbers
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    words = len(widths) - numbers
    ruler = ["-" * width for width in widths[:words]] + ["-" * (width - 1) + ":" for width in widths[words:]]
    ruler = "| " + " | ".join(ruler) + " |"
    return "\n".join([lines[0], ruler, *lines[1:]])


def fill(text: str, sections: dict[str, str]) -> str:
    """Replace what stands between `<!-- trl-ama: name -->` and `<!-- trl-ama: end -->`, so that it can be done again.

    A section without its two markers is put at the end. A marker within a section's new content is no marker any more.
    """
    for name, content in sections.items():
        begin, end = f"{_MARKER}{name} -->", f"{_MARKER}end -->"
        content = content.strip().replace(_MARKER.strip(), "<!- - trl-ama:")
        block = f"{begin}\n{content}\n{end}" if content else f"{begin}\n{end}"
        # Without another marker in between, or a lost one would take the text up to the next section with it
        pattern = re.compile(re.escape(begin) + f"(?:(?!{re.escape(_MARKER)}).)*" + re.escape(end), re.DOTALL)
        if pattern.search(text):
            text = pattern.sub(lambda _, block=block: block, text, count=1)
        else:
            text = f"{text.rstrip()}\n\n{block}\n"
    return text
