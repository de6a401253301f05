"""The snippets of the pages on publishing and reusing, run one after the other against the test Hub."""

import re
from pathlib import Path

import pytest
from docs_runs import FLAGS, base_and_pairs_fixture, run_page, snippets  # noqa: F401 - fixtures
from huggingface_hub import DatasetCard, ModelCard
from places import DOCS

from trl_ama.scripts.common import parse_arguments


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
