"""The snippets of the pages on publishing and reusing, run one after the other against the test Hub."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
from conftest import QUICK
from hub_world import upload_model, upload_pairs
from huggingface_hub import DatasetCard, ModelCard

from trl_ama.scripts.common import parse_arguments


DOCS = Path(__file__).parents[1] / "docs"
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


@pytest.fixture
def base_and_pairs(hub, model_dir, tmp_path, monkeypatch):
    """The repositories that the pages name, made by nobody yet."""
    upload_model(hub, model_dir, "HuggingFaceTB/SmolLM2-135M-Instruct")
    for task, kind, count in (("helpful", "list", 24), ("code", "sort", 12)):
        upload_pairs(hub, kind, count, f"org/{task}-pairs")
    monkeypatch.chdir(tmp_path)
    return hub


def test_publishing_and_reusing(base_and_pairs):
    hub = base_and_pairs
    assert run_page("publishing.md") == ["ama-specialists", "ama-losses", "ama"]
    made = {f"{repo_type}/{name}" for repo_type, name in hub.repos if "pairs" not in name and "SmolLM2-" not in name}
    assert made == {
        "model/org/smollm2-ama",
        "model/org/smollm2-ama-helpful",
        "model/org/smollm2-ama-code",
        "dataset/org/smollm2-ama-reference-losses",
        "dataset/org/smollm2-losses-copy",
        "dataset/org/smollm2-losses-ids",
    }
    assert hub.is_private("dataset", "org/smollm2-losses-copy")
    # The tree that the page shows
    page = (DOCS / "publishing.md").read_text()
    for name in hub.tree("dataset", "org/smollm2-ama-reference-losses"):
        assert name == ".gitattributes" or name.split("/")[-1] in page, name

    assert run_page("reusing.md") == ["ama"]
    assert "this model (ama_s)" in ModelCard.load("org/my-generalist").text
    assert not Path("outputs/reuse/specialists").exists()
    # Every specialist and loss dataset is where its tag leads
    assert "ama-specialist" in ModelCard.load("org/smollm2-ama-code").data.tags
    assert "ama-reference-losses" in DatasetCard.load("org/smollm2-ama-reference-losses").data.tags


def test_the_recipe_with_a_published_specialist(base_and_pairs):
    """The last recipe of the page on reusing: what its comment says about the specialist holds."""
    hub = base_and_pairs
    run_page("publishing.md")
    for language, text in snippets("reusing.md"):
        if language == "yaml" and "specialists.yaml" in text:
            Path("specialists.yaml").write_text(text)
    from trl_ama.scripts import ama_losses, ama_specialists

    for script in (ama_specialists, ama_losses):
        script.main(*parse_arguments(script.make_parser(), ["--config", "specialists.yaml", *FLAGS]))
    assert [path.name for path in Path("outputs/specialists/specialists").iterdir()] == ["code"]
    note = Path("outputs/specialists/reference_losses/helpful/fingerprint.json").read_text()
    assert f"org/smollm2-ama-helpful@{hub.commits('model', 'org/smollm2-ama-helpful')[0].oid}" in note


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_links_between_pages(page):
    text = (DOCS / page).read_text()
    for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", text):
        assert (DOCS / target).exists(), f"{page} links to {target}"
