"""The pages of the documentation, their code blocks and what they say in `code`."""

import re
import shlex
from typing import NamedTuple

from places import DOCS, PACKAGE, RECIPES, ROOT


PAGES = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted(DOCS.glob("*.md")))]
READMES = [str(path.relative_to(ROOT)) for path in sorted(RECIPES.rglob("README.md"))]
SCRIPTS = [str(path.relative_to(ROOT)) for path in sorted((PACKAGE / "scripts").glob("ama*.py"))]


class Block(NamedTuple):
    """A fenced code block of a page."""

    page: str
    language: str
    text: str


def blocks(page: str, *languages: str) -> list[Block]:
    """A page's code blocks in these languages."""
    found = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [Block(page, language, text) for language, text in found if language in languages]


def recipe_name(block: Block) -> str | None:
    """The file that a YAML block says it is: `# name.yaml` in its first line."""
    match = re.match(r"# ([\w.-]+\.yaml)\b", block.text)
    return match and match.group(1)


def command_lines(page: str) -> list[list[str]]:
    """The command lines of a page, as words, without the variables set before them."""
    lines = []
    for block in blocks(page, "bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            line = re.sub(r"^\w+=\$\((.*)\)$", r"\1", line)  # job=$(sbatch …)
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words:
                lines.append(words)
    return lines


def inline_code(page: str) -> list[str]:
    """What a page sets in backticks outside its code blocks."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
