"""Sphinx extension: the reference, from docstrings, dataclasses and parsers.

Directives for Markdown pages: `{api} trl_ama.AMAConfig` (an object with its docstring), `{keys} trl_ama.AMAConfig` (the
fields of a dataclass, as keys of a recipe) and `{commands}` (all commands of `trl ama…`).
"""

import argparse
import dataclasses
import importlib
import inspect
import re
import typing
from functools import cache
from pathlib import Path
from typing import Any

import hf_docstrings
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective


logger = logging.getLogger(__name__)

# Where other packages' names are documented. That a name exists is checked; its page, without a network, is not.
ELSEWHERE = {
    "trl": "https://huggingface.co/docs/trl",
    "transformers": "https://huggingface.co/docs/transformers",
    "datasets": "https://huggingface.co/docs/datasets",
    "peft": "https://huggingface.co/docs/peft",
    "accelerate": "https://huggingface.co/docs/accelerate",
    "huggingface_hub": "https://huggingface.co/docs/huggingface_hub",
    "torch": "https://pytorch.org/docs/stable",
}


def lookup(name: str) -> Any:
    """The object of a dotted name. Raises `LookupError` if there is none."""
    parts = name.split(".")
    for size in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:size]))
        except ImportError:
            continue
        try:
            for part in parts[size:]:
                found = getattr(found, part)
        except AttributeError:
            break
        return found
    raise LookupError(f"there is no '{name}'")


@cache
def public_name(name: str, module: str) -> str:
    """The dotted name that the reference has for `name`, as it is written in a docstring of `module`.

    Raises:
        LookupError: If nothing has that name.
    """
    import trl_ama

    head = name.split(".")[0]
    if head in ELSEWHERE or head == "trl_ama":
        lookup(name)
        return name
    if head in trl_ama.__all__:
        lookup(f"trl_ama.{name}")
        return f"trl_ama.{name}"
    folder = Path(trl_ama.__file__).parent
    own = Path(importlib.import_module(module).__file__)
    for path in [own, *sorted(folder.rglob("[a-z]*.py"))]:  # where it is defined, not where it is used
        if re.search(rf"^(class|def) {head}\b", path.read_text(encoding="utf-8"), re.MULTILINE):
            place = ".".join(path.relative_to(folder).with_suffix("").parts)
            found = f"{module if path == own else f'trl_ama.{place}'}.{name}"
            lookup(found)
            return found
    raise LookupError(f"there is no '{name}' in trl_ama")


class _Generated(SphinxDirective):
    """A directive whose content is Markdown that it writes itself."""

    required_arguments = 1

    def parse(self, text: str) -> list[nodes.Node]:
        container = nodes.container()
        self.state.nested_parse(StringList(text.splitlines(), self.get_location()), 0, container)
        return container.children

    def linker(self, module: str):
        def link(name: str, short: bool) -> str:
            try:
                target = public_name(name, module)
            except LookupError as error:
                logger.warning("%s refers to [`%s`]: %s", module, name, error, location=self.get_location())
                return f"`{name}`"
            shown = name.split(".")[-1] if short else name
            package = target.split(".")[0]
            if package in ELSEWHERE:
                return f"[`{shown}`]({ELSEWHERE[package]})"
            return f"{{py:obj}}`{shown} <{target}>`"

        return link


class Api(_Generated):
    """An object of trl_ama: signature, docstring, and the public methods that it defines itself."""

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        try:
            return self.parse("\n".join(self.describe(name, lookup(name), 6)))
        except LookupError as error:
            logger.warning("%s", error, location=self.get_location())
            return []

    def describe(self, name: str, found: Any, fence: int) -> list[str]:
        module, _, short = name.rpartition(".")
        if inspect.isclass(found):
            kind = "exception" if issubclass(found, BaseException) else "class"
        else:
            kind = "function"
        signature = "" if kind == "exception" else call_signature(found)
        lines = ["`" * fence + f"{{py:{kind}}} {short}{signature}", f":module: {module}", ""]
        lines += self.docstring(found)
        if inspect.isclass(found):
            for member, value in vars(found).items():
                lines += self.member(member, value, fence - 1)
        return [*lines, "`" * fence, ""]

    def member(self, name: str, value: Any, fence: int) -> list[str]:
        if isinstance(value, (classmethod, staticmethod)):
            value = value.__func__
        function = value.fget if isinstance(value, property) else value
        documented = inspect.isfunction(function) and function.__doc__
        if name.startswith("_") or not documented:
            return []
        if isinstance(value, property):
            head = [f"{{py:property}} {name}"]
        else:
            head = [f"{{py:method}} {name}{call_signature(function, skip_first=True)}"]
            if getattr(value, "__isabstractmethod__", False):
                head.append(":abstractmethod:")
        return ["`" * fence + head[0], *head[1:], "", *self.docstring(function), "`" * fence, ""]

    def docstring(self, found: Any) -> list[str]:
        module = inspect.getmodule(found).__name__
        try:
            return hf_docstrings.to_markdown(found.__doc__ or "", self.linker(module)).splitlines()
        except ValueError as error:
            logger.warning("%s.%s: %s", module, found.__qualname__, error, location=self.get_location())
            return []


def call_signature(found: Any, skip_first: bool = False) -> str:
    """Parameters and defaults without annotations: the types are in the docstrings.

    Of a dataclass that extends another package's, only its own fields, and a word for the others.
    """
    base = next((base for base in getattr(found, "__mro__", [])[1:] if dataclasses.is_dataclass(base)), None)
    parameters = list(inspect.signature(found).parameters.values())[skip_first:]
    if base is not None:
        theirs = {field.name for field in dataclasses.fields(base)}
        parameters = [parameter for parameter in parameters if parameter.name not in theirs]
        parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
        others = inspect.Parameter(base.__name__.lower() + "_fields", inspect.Parameter.VAR_KEYWORD)
        parameters.append(others)
    factory = dataclasses.fields(found) if dataclasses.is_dataclass(found) else ()
    factories = {field.name: field.default_factory for field in factory}
    for number, parameter in enumerate(parameters):
        parameters[number] = parameter.replace(annotation=inspect.Parameter.empty)
        if callable(factories.get(parameter.name)) and factories[parameter.name] is not dataclasses.MISSING:
            parameters[number] = parameters[number].replace(default=factories[parameter.name]())
    return str(inspect.Signature(parameters))


class Keys(_Generated):
    """The fields of a dataclass as keys of a recipe and flags of the command, with their help.

    A second argument names the class that recipes make, where its defaults are others.
    """

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        found, *made = map(lookup, self.arguments)
        return self.parse("\n".join(self.describe(found, made=made[0] if made else found)))

    def describe(self, found: type, dashes: str = "", made: type | None = None) -> list[str]:
        ours = found.__module__.startswith("trl_ama")
        texts = hf_docstrings.parameters(found.__doc__) if ours else {}
        lines = []
        for field in own_fields(found):
            field = (made or found).__dataclass_fields__[field.name]
            help_text = field.metadata.get("help") or texts.get(field.name, ("", ""))[1]
            if ours and not help_text:
                logger.warning("%s.%s has no help", found.__name__, field.name, location=self.get_location())
            if not ours:
                help_text = plain(help_text)
            text = hf_docstrings._text(" ".join(help_text.split()), self.linker(found.__module__))
            lines += [
                "",
                f"`{dashes}{field.name}`",
                f": {text or 'Without a description.'} *{kind_of(made or found, field)}*",
                "",
            ]
        return lines


def own_fields(found: type) -> list[dataclasses.Field]:
    """The fields that a dataclass adds to those it extends."""
    theirs = {
        field.name
        for base in found.__mro__[1:]
        if dataclasses.is_dataclass(base)
        for field in dataclasses.fields(base)
    }
    return [field for field in dataclasses.fields(found) if field.init and field.name not in theirs]


def kind_of(found: type, field: dataclasses.Field) -> str:
    """Type and default of a field, in a few words."""
    annotation = typing.get_type_hints(found)[field.name]  # `field.type` is changed by parsers that were made before
    kind = annotation.__name__ if type(annotation) is type else str(annotation)
    kind = re.sub(r"Optional\[(.*)\]", r"\1 | None", kind.replace("NoneType", "None"))
    kind = re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", kind)
    if field.default is not dataclasses.MISSING:
        return f"(`{kind}`, default `{getattr(field.default, 'value', field.default)!r}`)"
    if field.default_factory is not dataclasses.MISSING:
        return f"(`{kind}`, default `{field.default_factory()!r}`)"
    return f"(`{kind}`)"


def plain(text: str) -> str:
    """Another package's help text, with what Markdown would take for markup escaped, but for code in backticks."""
    parts = re.split(r"(`[^`\n]+`)", text.replace("%%", "%"))
    return "".join(part if part.startswith("`") else re.sub(r"([\\*_\[\]<>{}$|~#`])", r"\\\1", part) for part in parts)


class Commands(_Generated):
    """Every command: what it does, its examples, and the flags that it has beside the keys of a recipe."""

    required_arguments = 0

    def run(self) -> list[nodes.Node]:
        from trl_ama.scripts import COMMANDS

        found: list[nodes.Node] = []
        for name, text in COMMANDS.items():
            script = importlib.import_module(f"trl_ama.scripts.{name.replace('-', '_')}")
            section = nodes.section(ids=[f"trl-{name}"], names=[f"trl {name}"])
            section += nodes.title("", "", nodes.literal("", f"trl {name}"))
            section += self.parse("\n".join([f"{text}.", "", examples(script.__doc__), "", *self.flags(script)]))
            found.append(section)
        return found

    def flags(self, script: Any) -> list[str]:
        from trl_ama.scripts.common import make_parser

        parser = script.make_parser()
        common = getattr(make_parser("ama"), "dataclass_types", None)
        lines = []
        if hasattr(parser, "dataclass_types"):
            for found in parser.dataclass_types:
                if found not in common:
                    lines += Keys.describe(self, found, dashes="--")
        else:
            for action in parser._actions:
                if not isinstance(action, argparse._HelpAction):
                    lines += [f"`{' '.join(action.option_strings) or action.metavar}`", f": {plain(action.help)}", ""]
        shared = "The [keys of a recipe](config_keys.md) are its flags too."
        own = "Flags of its own:" if lines else ""
        return [own, "", *lines, shared if hasattr(parser, "dataclass_types") else ""]


def examples(docstring: str) -> str:
    """The examples at the head of a script: their captions are written as comments, and continued lines are joined."""
    return re.sub(r" {2,}", " ", re.sub(r"^# (.*)$", r"\1", docstring.strip(), flags=re.MULTILINE))


def write_index(app, error) -> None:
    """The landing page lies in a folder; `index.html` leads to it."""
    if error is None and app.builder.name == "html" and app.config.root_doc != "index":
        target = app.builder.get_target_uri(app.config.root_doc)
        page = f'<!doctype html><meta charset="utf-8"><title>trl-ama</title><meta http-equiv="refresh" content="0; url={target}">'
        Path(app.outdir, "index.html").write_text(f'{page}<a href="{target}">trl-ama</a>\n', encoding="utf-8")


def setup(app) -> dict[str, Any]:
    """Register the directives."""
    app.add_directive("api", Api)
    app.add_directive("keys", Keys)
    app.add_directive("commands", Commands)
    app.connect("build-finished", write_index)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
