"""YAML of recipes: as `yaml.safe_load`, which of a key that is there twice keeps the last without a word."""

from typing import Any

import yaml

from .errors import AMAError


def load_yaml(text: str, where: str) -> Any:
    """Parse YAML in which no mapping, at any depth, has a key twice.

    Args:
        text (`str`): The YAML.
        where (`str`): What it is, for the message.

    Raises:
        AMAError: If a key is there twice, with both lines. What is no YAML raises as `yaml.safe_load` does.
    """
    return load_with_lines(text, where)[0]


def load_with_lines(text: str, where: str) -> tuple[Any, dict[str, int]]:
    """[`load_yaml`], and the line of each key of the outermost mapping; the text is parsed once."""
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        check_keys_once(root, where)
        pairs = root.value if isinstance(root, yaml.MappingNode) else ()
        lines = {
            str(key.value): key.start_mark.line + 1 for key, _ in pairs
        }  # before `<<` is replaced by what it brings
        return (None if root is None else loader.construct_document(root)), lines
    finally:
        loader.dispose()


def check_keys_once(root: Any, where: str) -> None:
    """Raise an `AMAError` if a mapping of a composed YAML document has a key twice.

    Keys that `<<` brings in may be overridden: that is what it is for.
    """
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            lines: dict[tuple[str, str], int] = {}
            for key, value in node.value:
                waiting.append(value)
                if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                    continue
                name, line = (key.tag, key.value), key.start_mark.line + 1
                if name in lines:
                    lines_of = f"lines {lines[name]} and {line}" if lines[name] != line else f"line {line}"
                    raise AMAError(
                        f"{where} has the key '{key.value}' twice in one mapping ({lines_of}), and only the last would count. Keep one "
                        "of them."
                    )
                lines[name] = line


def check_yaml_file(path: str, where: str) -> None:
    """[`check_keys_once`] of a file; one that cannot be read as YAML is left to whoever reads it next."""
    try:
        with open(path, encoding="utf-8") as file:
            root = yaml.compose(file, yaml.SafeLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return
    check_keys_once(root, where)
