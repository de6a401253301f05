"""Runs the snippets of a page of the documentation."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
from hub_world import upload_model, upload_pairs
from places import DOCS
from tiny_runs import QUICK

from trl_ama.scripts.common import parse_arguments


# So that a snippet is over in seconds: what a command gets on top, and what stands for `max_steps=300` in Python
FLAGS = {**QUICK, "max_steps": 2, "lora_r": 4, "max_length": 64, "specialist_args": "{max_steps: 2}"}


FLAGS = [word for key, value in FLAGS.items() for word in (f"--{key}", str(value))]


IN_PYTHON = "max_steps=2, " + ", ".join(f"{key}={value!r}" for key, value in QUICK.items())


def snippets(page: str) -> list[tuple[str, str]]:
    """Language and text of a page's code blocks."""
    return re.findall(r"^```(\w+)\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


def run_page(page: str) -> list[str]:
    """Run a page's snippets in the current folder. Returns the commands that were run."""
    commands = []
    for language, text in snippets(page):
        if language == "yaml":
            name = re.match(r"# (\S+\.yaml)\n", text)
            assert name, f"a YAML snippet of {page} does not say what file it is:\n{text}"
            Path(name.group(1)).write_text(text)
        elif language == "bash":
            for line in text.splitlines():
                words = shlex.split(line, comments=True)
                if words[0] == "hf":
                    continue  # a login, which the tests have
                assert words[0] == "trl", line
                script = import_module(f"trl_ama.scripts.{words[1].replace('-', '_')}")
                script.main(*parse_arguments(script.make_parser(), [*words[2:], *FLAGS]))
                commands.append(words[1])
        elif language == "python":
            exec(compile(text.replace("max_steps=300", IN_PYTHON), page, "exec"), {})
    return commands


@pytest.fixture(name="base_and_pairs")
def base_and_pairs_fixture(hub, model_dir, tmp_path, monkeypatch):
    """The repositories that the pages name, made by nobody yet."""
    upload_model(hub, model_dir, "HuggingFaceTB/SmolLM2-135M-Instruct")
    for task, kind, count in (("helpful", "list", 24), ("code", "sort", 12)):
        upload_pairs(hub, kind, count, f"org/{task}-pairs")
    monkeypatch.chdir(tmp_path)
    return hub
