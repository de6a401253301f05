"""The site: it builds strictly, what is broken fails it, and docstrings become Markdown with references."""

import contextlib
import io
import re
import sys
from pathlib import Path

import pytest
from places import ROOT


pytest.importorskip("myst_parser", reason="the site needs the extra `docs`")
pytest.importorskip("furo", reason="the site needs the extra `docs`")
sys.path.insert(0, str(ROOT / "docs" / "_sphinx"))

import ama_reference  # noqa: E402
import hf_docstrings  # noqa: E402
from sphinx.cmd.build import build_main  # noqa: E402


pytestmark = pytest.mark.slow


PLAIN = {"link": lambda name, short: f"<{name.split('.')[-1] if short else name}>"}


def build(source: Path, output: Path) -> tuple[int, str]:
    """What `make docs` does, without importing everything again. Returns the exit code and what was said."""
    flags = ["-b", "html", "-W", "--keep-going", "-n", "-E", "-a", "-q"]
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = build_main([*flags, *map(str, ("-c", ROOT / "docs", "-d", output / ".doctrees", source, output))])
    return code, said.getvalue()


# ---- The whole site ----


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    output = tmp_path_factory.mktemp("site")
    code, said = build(ROOT, output)
    assert code == 0, said
    return output


def page(site: Path, name: str) -> str:
    return (site / f"{name}.html").read_text(encoding="utf-8")


def test_site_builds_strictly_and_loads_nothing_from_elsewhere(site):
    assert "docs/index.html" in page(site, "index")
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    for path in pages:
        text = path.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)="([^"]+)"', text)
        assert not [address for address in loaded if re.match(r"(https?:)?//", address)], path
    for path in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", path.read_text(encoding="utf-8")), path


def test_menu_and_landing_page_list_every_page(site):
    landing = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    menu = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index", "README"}
    assert (
        set(re.findall(r"\]\((\w+)\.md\)", landing))
        == pages
        == set(re.findall(r"^(?:[\w ]+ <)?(\w+)>?$", menu, re.MULTILINE))
    )


def test_reference_has_every_export_with_its_docstring(site):
    import trl_ama

    api = page(site, "docs/api")
    for name in set(trl_ama.__all__) - {"__version__"}:
        assert f'id="trl_ama.{name}"' in api, name
    assert 'id="trl_ama.MixingStrategy.observe"' in api
    # An argument, its type, and a reference out of a docstring that became a link
    assert "Step size η of the mixture weights" in api
    assert 'href="#trl_ama.AMATrainer"' in api and "[<code" not in api and "[`" not in api
    assert 'href="https://huggingface.co/docs/trl"' in api


def test_commands_and_keys_are_all_there(site):
    import dataclasses

    from trl import ModelConfig

    from trl_ama import AMAConfig, TaskConfig, TaskMixtureConfig
    from trl_ama.recipe.arguments import PipelineArguments
    from trl_ama.scripts import COMMANDS

    commands = page(site, "docs/cli")
    for name, text in COMMANDS.items():
        assert f'id="trl-{name}"' in commands and text.split("'")[0] in commands
    assert "--output" in commands and "pairs of each task to show" in commands
    keys = page(site, "docs/config_keys")
    for group in (AMAConfig, ModelConfig, TaskConfig, TaskMixtureConfig, PipelineArguments):
        for field in dataclasses.fields(group):
            if field.init:
                assert f'<span class="pre">{field.name}</span>' in keys, field.name


# ---- What is broken ----

GOOD = {
    "index.md": "# Site\n\n[A page](page.md#a-part)\n\n```{toctree}\npage\n```\n",
    "page.md": "# Page\n\n## A part\n\n```{api} broken_docs.good\n```\n",
}
MODULE = '''
def good():
    """See [`AMAError`], [`~trl.DPOConfig`] and [`good`]."""

def unknown():
    """See [`trl_ama.nothing`]."""

def elsewhere():
    """See [`~trl.NoSuchConfig`]."""

def undocumented():
    """See [`trl_ama.common.errors.nearest`]."""
'''


@pytest.fixture
def small_site(tmp_path, monkeypatch):
    """Builds a site of two pages with changes. Returns the exit code and what was said; the folder is `tmp_path`."""

    def make(**changes: str) -> tuple[int, str]:
        (tmp_path / "docs").mkdir()
        (tmp_path / "broken_docs.py").write_text(MODULE)
        for name, text in {**GOOD, **{f"{name}.md": text for name, text in changes.items()}}.items():
            (tmp_path / "docs" / name).write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "broken_docs", raising=False)
        return build(tmp_path, tmp_path / "site")

    return make


def test_a_small_site_builds(small_site, tmp_path):
    code, said = small_site(page=GOOD["page.md"].replace("broken_docs.good", "trl_ama.AMAError"))
    assert code == 0, said
    assert (tmp_path / "site/docs/page.html").is_file()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"index": GOOD["index.md"].replace("page.md#", "pge.md#")}, "pge.md"),
        ({"index": GOOD["index.md"].replace("#a-part", "#a-prt")}, "a-prt"),
        ({"forgotten": "# Nobody lists me\n"}, "isn't included in any toctree"),
        ({"index": GOOD["index.md"].replace("\npage\n", "\npage\nmissing\n")}, "nonexisting document"),
        ({"page": GOOD["page.md"].replace("good", "unknown")}, "refers to [`trl_ama.nothing`]"),
        ({"page": GOOD["page.md"].replace("good", "elsewhere")}, "refers to [`trl.NoSuchConfig`]"),
        ({"page": GOOD["page.md"].replace("good", "undocumented")}, "trl_ama.common.errors.nearest"),
        ({"page": GOOD["page.md"].replace("broken_docs.good", "trl_ama.Nothing")}, "there is no 'trl_ama.Nothing'"),
    ],
    ids=["link", "anchor", "not in a menu", "menu", "our name", "another package's name", "not on a page", "object"],
)
def test_what_is_broken_fails_the_build(changes, said, small_site):
    code, found = small_site(**changes)
    assert code != 0
    assert said in found


# ---- Docstrings ----


def test_arguments_become_definitions():
    markdown = hf_docstrings.to_markdown(
        """Trains.

        See [`~trl.DPOTrainer`] and [`AMAConfig`].

        Args:
            model, ref_model:
                As there.
            args ([`AMAConfig`], *optional*):
                Settings,
                on two lines. # (k,)

        Example:

        ```python
        Args: [`not touched`]
        ```

        Returns:
            `dict` of [`~a.b.C`].

        Raises:
            AMAError: If it
                must.
        """,
        **PLAIN,
    )
    assert markdown.splitlines() == [
        *("Trains.", "", "See <DPOTrainer> and <AMAConfig>.", "", "", "**Parameters**", ""),
        *("`model, ref_model`", ": As there.", ""),
        *("`args` (<AMAConfig>, *optional*)", ": Settings, on two lines. *(k,)*", "", ""),
        *("", "**Example**", "", "", "```python", "Args: [`not touched`]", "```", ""),
        *("", "**Returns**", "", "`dict` of <C>.", "", "", "**Raises**", "", "<AMAError>", ": If it must."),
    ]


def test_what_is_no_entry_is_an_error():
    with pytest.raises(ValueError, match="not an entry"):
        hf_docstrings.entries(["just some words without a colon"])


def test_every_docstring_can_be_read_and_refers_to_what_exists():
    import ast

    seen = 0
    for path in sorted((ROOT / "trl_ama").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                continue
            text = ast.get_docstring(node) or ""
            hf_docstrings.to_markdown(text, **PLAIN)
            for name in hf_docstrings.references(text):
                ama_reference.public_name(name, module)  # raises what the site's build would say
                seen += 1
    assert seen > 50


def test_other_packages_help_is_shown_as_it_is():
    assert ama_reference.plain("100%% of <a> in `x_*` and *b*") == r"100% of \<a\> in `x_*` and \*b\*"
