"""Text of any origin as Markdown that says what the text says, and nothing else."""

import re


_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|<>~&$])")


def escape(text: str) -> str:
    """`text` in one line of prose or a table cell, with nothing in it that Markdown or HTML would act upon."""
    return (
        _SPECIAL.sub(r"\\\1", " ".join(str(text).split()))
        .replace("\\<", "&lt;")
        .replace("\\>", "&gt;")
        .replace("\\&", "&amp;")
    )


def code(text: str) -> str:
    """`text` as a code span, also in a table cell."""
    line = " ".join(str(text).split()).replace("|", "¦")
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    return f"{ticks} {line} {ticks}" if "`" in line else f"{ticks}{line}{ticks}"


def fence(text: str, language: str = "") -> str:
    """`text` as a code block that no line of it can end."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text.strip()}\n{ticks}"


def table(rows: list[list[str]]) -> str:
    """A table of cells that are Markdown already; the first row is its head, the first column is aligned left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    ruler = "| " + " | ".join(["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]) + " |"
    return "\n".join([lines[0], ruler, *lines[1:]])


def fill(text: str, sections: dict[str, str]) -> str:
    """Replace what stands between `<!-- trl-ama: name -->` and `<!-- trl-ama: end -->`, so that it can be done again.

    A section without its markers is put at the end.
    """
    for name, content in sections.items():
        begin, end = f"<!-- trl-ama: {name} -->", "<!-- trl-ama: end -->"
        block = f"{begin}\n{content.strip()}\n{end}" if content.strip() else f"{begin}\n{end}"
        pattern = re.compile(re.escape(begin) + r".*?" + re.escape(end), re.DOTALL)
        if pattern.search(text):
            text = pattern.sub(lambda _, block=block: block, text, count=1)
        else:
            text = f"{text.rstrip()}\n\n{block}\n"
    return text
