"""Names and texts that would be code in a card: they come out as what they say, in cards that stay whole."""

import json
import shutil
from pathlib import Path

import pytest
from card_checks import MARKER, NASTY, TEXT, check_body, front_matter, tokens
from hub_world import parse, write_recipe
from huggingface_hub import DatasetCard, ModelCard
from kept import DRAW
from markdown_it import MarkdownIt
from PIL import Image
from tiny_pairs import make_rows

from trl_ama import load_reference_losses, run_pipeline
from trl_ama.common.run_folder import RunFolder
from trl_ama.pipeline.run import RunSettings
from trl_ama.pipeline.run_losses import joined_data
from trl_ama.recipe.text import recipe_yaml
from trl_ama.report.markdown import code, escape, fence, fill, table
from trl_ama.report.results import plot_mixture


TASKS = ["a._x_", "www.evil.com"]


@pytest.fixture(scope="module")
def nasty(model_dir, tmp_path_factory):
    """A whole run in a folder, of a model and on files that have such names."""
    place = tmp_path_factory.mktemp("nasty")
    base = shutil.copytree(model_dir, place / f"base {NASTY}")
    tasks = []
    for task, rule in zip(TASKS, ("list", "sort"), strict=True):
        files = {}
        for seed, (split, size) in enumerate({"train": 16, "test": 8}.items()):
            path = place / f"{split} {task} <img src=x>|`![x](http:evil)`.jsonl"
            rows = make_rows(rule, size, seed)
            rows[0]["chosen"][0]["content"] += f" {MARKER} {{{{ 7*7 }}}} <script>alert(1)</script> \u202e\x00"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            files[split] = str(path).replace("[", "[[]")
        tasks.append({"task": task, "path": "json", "data_files": files, "eval_split": "test"})
    recipe = write_recipe(
        place / "recipe.yaml",
        model_name_or_path=str(base),
        tasks=tasks,
        specialist_args={"max_steps": 1, "run_name": TEXT},
        max_steps=2,
    )
    arguments = parse(recipe)
    arguments[1].output_dir = str(place / f"run {NASTY}")
    results = run_pipeline(*arguments)
    return arguments, Path(arguments[1].output_dir), results


def test_cards_of_specialists(nasty, hub):
    _, run, _ = nasty
    for task in TASKS:
        path = run / "specialists" / task / "README.md"
        text = path.read_text()
        assert set(front_matter(text)) == {"library_name", "tags", "model-index"}
        card = ModelCard.load(path)
        card.validate()
        columns = check_body(card.text, blocks=["yaml", "yaml", "python", "bibtex"])
        assert columns == [3] * 4 + [2] * 5
        assert "<script>" in front_matter(text)["model-index"][0]["name"]  # said, not done
        assert "49" not in card.text and MARKER not in card.text.replace(fence(recipe_of(nasty, task), "yaml"), "")


def recipe_of(nasty, task=None):
    return recipe_yaml(RunSettings(*nasty[0]).recipe, task)


def test_card_of_the_generalist(nasty, hub):
    _, run, _ = nasty
    path = run / "generalists/ama_s/README.md"
    data = front_matter(path.read_text())
    assert set(data) == {"library_name", "tags", "model-index"}
    card = ModelCard.load(path)
    card.validate()
    columns = check_body(
        card.text,
        images=("mixture.png",),
        blocks=["yaml", "yaml", "python", "bibtex", "bibtex"],
        links=("https://arxiv.org",),
    )
    assert columns == [4] * 15 + [3] * 3
    assert card.text.count(MARKER) == 4  # one for each section of the template
    assert "49" not in card.text


def test_card_of_the_losses(nasty, hub):
    _, run, _ = nasty
    load_reference_losses(str(run / "reference_losses")).push_to_hub("org/losses")
    text = hub.tree("dataset", "org/losses")["README.md"].decode()
    assert set(front_matter(text)) == {"tags", "configs", "trl_ama"}
    card = DatasetCard.load("org/losses")
    card.validate()
    columns = check_body(card.text, blocks=["python", "yaml"])
    assert columns.count(5) == 3 and set(columns) == {2, 5}
    assert "alert(1)" not in text  # no text of a pair
    assert load_reference_losses("org/losses").tasks == TASKS


def test_texts_come_through_unchanged(nasty):
    arguments, run, _ = nasty
    settings = RunSettings(*arguments)
    losses = load_reference_losses(str(run / "reference_losses"))
    assert joined_data(settings)["train"].num_rows == 32
    for split in ("train", "test"):
        stored = {row["pair_id"]: row["chosen"][0]["content"] for row in losses[split]}
        given = {row["pair_id"]: row["chosen"][0]["content"] for row in settings.inputs.data[split]}
        assert stored == given and sum(MARKER in text for text in stored.values()) == 2
    for path in run.rglob("*.md"):
        assert "alert(1)</script>" not in path.read_text()


def test_the_plot(nasty, tmp_path, monkeypatch):
    """Readable, every task in the legend, and the legend within the picture."""
    from matplotlib.figure import Figure

    for name, draw in DRAW.items():
        monkeypatch.setattr(Figure, name, draw)
    run = RunFolder(nasty[1])
    generalists = {path.name: path for path in run.generalists.iterdir()}
    plot_mixture(generalists, RunSettings(*nasty[0]).recipe.task_names, run.plot)
    Image.open(run.plot).verify()
    names = [f"task-{'x' * 56}.{number}" for number in range(7)]
    legends = []
    save = Figure.savefig

    def record(figure, *args, **kwargs):
        legends.append([text.get_text() for text in figure.legends[0].get_texts()])
        save(figure, *args, **kwargs)
        box = figure.legends[0].get_window_extent().width / figure.dpi
        with Image.open(args[0]) as picture:
            assert picture.width / kwargs["dpi"] >= box

    monkeypatch.setattr(Figure, "savefig", record)
    plot_mixture(generalists, names, tmp_path / "mixture.png")
    assert legends == [names]


# ---- Markdown ----

TEXTS = [
    NASTY, TEXT, "", " ", "`", "``", "a`", "\\", "a\\", "a|", "\\|", "<", "&lt;", "&", "*a*", "_a_", "a_b", "a._b_",
    "![x](y)", "[x](y)", "[x]: y", "<http://x.y>", "http://x.y", "www.x.y", "a@b.de", "<!--", "-->", "$x$", "{{7*7}}",
    "{% raw %}", "\ud800", "\u202eabc", "\x1b[2J", "\x00", "| a | b |", "# x", "~~x~~", "x  \ny", "\ufeff", "&#60;b>",
]  # fmt: skip


def inline(text):
    return [token for token in tokens(text) if token.type not in ("paragraph_open", "paragraph_close", "inline")]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_escaped_text_says_what_it_says(text):
    line = " ".join(text.split())
    seen = "".join(character if character.isprintable() else "\ufffd" for character in line)
    for prefix in ("x ", "# x "):
        found = [
            token
            for token in inline(prefix + escape(text) + " x")
            if token.type not in ("heading_open", "heading_close")
        ]
        assert {token.type for token in found} <= {"text", "text_special"}, found
        assert " ".join("".join(token.content for token in found).split()) == " ".join(f"x {seen} x".split())
    found = inline("x " + code(text) + " x")
    assert [token.type for token in found] == ["text", "code_inline", "text"]
    assert found[1].content.strip() == seen.replace("|", "¦")
    for cell in (escape(text), code(text)):
        rendered = MarkdownIt("commonmark").enable("table").render(table([["a", "b"], [cell, "end"]]))
        assert rendered.count("<td") == 2 and '<td style="text-align:right">end</td>' in rendered, rendered
    escape(text).encode()
    code(text).encode()


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_fences_hold(text):
    found = [token for token in tokens(f"x\n\n{fence(text, 'yaml')}\n\ny") if token.type == "fence"]
    assert len(found) == 1 and found[0].content.strip() == text.strip().replace("\x00", "\ufffd")


def test_sections_can_be_filled_again_whatever_was_in_them():
    begin = "<!-- trl-ama: {} -->"
    text = f"before\n{begin.format('a')}\n{MARKER}\nbetween\n{begin.format('b')}\n{MARKER}\nafter"
    once = fill(text, {"a": f"x {MARKER} {begin.format('b')} y", "b": "second"})
    assert once.count(MARKER) == 2 and once.count(begin.format("b")) == 1
    again = fill(fill(once, {"a": "first"}), {"b": "second"})
    assert (
        again == f"before\n{begin.format('a')}\nfirst\n{MARKER}\nbetween\n{begin.format('b')}\nsecond\n{MARKER}\nafter"
    )
    # A marker that somebody deleted does not take the text after it along
    broken = again.replace(f"first\n{MARKER}", "first")
    assert "between" in fill(broken, {"a": "new"}) and "after" in fill(broken, {"a": "new"})
