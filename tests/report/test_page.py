"""The page of a run as a file: whole, without anything from elsewhere, safe from its texts, small, and made by every run."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub_world import SIZES, parse, write_pairs, write_recipe
from made_runs import HOSTILE, STRATEGIES, Tree, copy_fixture, finished_fixture, make_run, page_of, words, write  # noqa: F401 - fixtures

from trl_ama import AMAError, cli, run_pipeline
from trl_ama.common.run_folder import NOTE_FILE
from trl_ama.report.collect import collect
from trl_ama.report.page import LARGEST, render_run, script_json, visible, write_comparison


# ---- One run ----


def test_structure(finished):
    page = page_of(finished)
    tree = Tree(page)
    assert tree.open == [] and page.startswith("<!DOCTYPE html>")
    assert tree.all("html") == [{"lang": "en"}] and len(tree.all("h1")) == 1 and len(tree.all("main")) == 1
    levels = [int(tag[1]) for tag, _ in tree.elements if re.fullmatch("h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False)), levels
    ids = [attributes["id"] for _, attributes in tree.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    for _, attributes in tree.elements:  # what is referred to is there
        for name in ("aria-labelledby", "aria-describedby"):
            assert attributes.get(name) is None or attributes[name] in ids
        assert not attributes.get("href") or attributes["href"][1:] in ids
    assert all(attributes.get("scope") in ("row", "col", "colgroup") for attributes in tree.all("th"))
    assert len(tree.all("figure")) == len(STRATEGIES) * 4
    assert all(attributes["aria-label"] for attributes in tree.all("svg") if attributes.get("role") == "img")
    assert all("role" in one or one.get("aria-hidden") == "true" for one in tree.all("svg"))


def test_nothing_is_loaded_from_elsewhere(finished):
    page = page_of(finished)
    tree = Tree(page)
    assert not {"link", "img", "iframe", "object", "base", "form"} & {tag for tag, _ in tree.elements}
    assert all("src" not in one and "style" not in one for _, one in tree.elements)
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttp|innerHTML|eval\(", page)


def test_long_texts_are_cut(tmp_path):
    page = page_of(make_run(tmp_path / "mine", texts=["x" * 9000 + "END"] * 12))
    assert "8603 more characters" in page and "are not shown" in page and "END" not in page
    assert "x" * 4001 not in page


def test_hostile_texts_are_text(tmp_path):
    folder = make_run(tmp_path / 'run" onload="x', tasks=HOSTILE, strategies=["ama_s", "<script>'\""], texts=HOSTILE)
    write(folder / NOTE_FILE, {"recipe": "\n".join([*HOSTILE, "half \ud800"]), "arguments": HOSTILE[1], "base_model": HOSTILE[0],
                               "mixing": "ama_s", "published": {"": HOSTILE[3]}, "data": {HOSTILE[1]: HOSTILE[0]},
                               "versions": {HOSTILE[1]: HOSTILE[2]}, "specialists": {HOSTILE[2]: HOSTILE[4]}})  # fmt: skip
    stage = folder / "generalists/ama_s/stage.json"
    write(stage, {"fingerprint": {**dict.fromkeys(HOSTILE, HOSTILE), "versions": {}}, "result": {"steps": HOSTILE[0]}})
    other = shutil.copytree(folder, tmp_path / "two <svg onload=alert(1)>")
    comparison = write_comparison([folder, other], tmp_path / "both.html").read_text(encoding="utf-8")
    for page in (page_of(folder), comparison):
        tree = Tree(page)
        assert tree.open == []
        scripts = [text for tag, text in tree.texts if tag == "script"]
        assert len(tree.all("script")) == 2 and len(scripts) == 2 and len(tree.all("style")) == 1
        assert "<" not in scripts[0] and "sentinel" not in scripts[1]
        assert not {"img", "iframe", "base", "form", "object", "link"} & {tag for tag, _ in tree.elements}
        assert not [
            name for _, one in tree.elements for name in one if name.startswith("on") or name in ("src", "style")
        ]
        assert {one.get("http-equiv") for one in tree.all("meta")} == {None, "Content-Security-Policy"}
        assert not re.search("[\u202a-\u202e\u2066-\u2069\u2028\x00\x1b\ud800]", page)
        read = words(page)
        assert "⟨U+202E⟩gnp.exe⟨U+2066⟩⟨U+2028⟩⟨U+0000⟩⟨U+001B⟩" in read
        assert "window.sentinel = 1" in read and "1337" not in read  # said, not done


def test_json_in_the_page_cannot_end_its_script():
    for text in HOSTILE:
        found = script_json({"x": text})
        assert not re.search("[<>&\u2028\ud800]", found) and json.loads(found) == {"x": text}


def test_what_can_be_seen_is_left_as_it_is():
    for text in ("a\nb\tc", "👩\u200d💻", "نمی\u200cخواهم", "日本語", "é"):
        assert visible(text) == text
    assert visible("a\u00adb\ufeff") == "a⟨U+00AD⟩b⟨U+FEFF⟩"


def test_the_policy_lets_only_our_script_run(finished):
    import base64
    import hashlib

    page = page_of(finished)
    policy = next(one["content"] for one in Tree(page).all("meta") if "http-equiv" in one)
    assert policy.startswith("default-src 'none'; ")
    for tag, kind in (("<style>", "style-src"), ("<script>", "script-src")):
        text = page.split(tag, 1)[1].split(f"</{tag[1:]}", 1)[0]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy


# ---- Size and time ----


def test_long_log_makes_a_small_page_quickly(tmp_path):
    tasks = [f"task{number}" for number in range(8)]
    folder = make_run(
        tmp_path / "long", tasks=tasks, steps=10_000, pairs=40, strategies=["ama_s"], texts=["😀<&" * 3000] * 40
    )
    begin = time.process_time()
    page = page_of(folder)
    assert time.process_time() - begin < 4  # seconds of a slow machine
    assert len(page.encode()) < LARGEST
    assert "The log has 10000 entries; 300 of them that show its course are drawn." in page
    assert page.count("more characters") > 50


def test_very_many_curves_fit_too(tmp_path):
    folder = make_run(tmp_path / "many", tasks=[f"t{number}" for number in range(40)], steps=400,
                      strategies=[f"s{number}" for number in range(10)])  # fmt: skip
    assert len(page_of(folder).encode()) < LARGEST


# ---- The command ----


def report(*argv) -> int:
    return cli.main(["ama-report", *map(str, argv)])


def test_a_folder_is_never_named_like_a_repository(copy, monkeypatch):
    """A stranger could own `generalists/ama_s` on the Hub."""
    monkeypatch.chdir(copy)
    assert "from_pretrained(&#34;./generalists/" in render_run(collect("."))


def test_command(copy, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("trl.cli.accelerate_launcher.launch_training_script", lambda *args: pytest.fail("launched"))
    assert report(copy) == 0
    assert capsys.readouterr().out == f"Page: {copy / 'report' / 'index.html'}\n"
    first = (copy / "report/index.html").read_bytes()
    assert report(copy) == 0 and (copy / "report/index.html").read_bytes() == first
    shutil.copytree(copy, tmp_path / "two")
    monkeypatch.chdir(tmp_path)
    assert report(copy, "two") == 0 and (tmp_path / "ama-comparison.html").is_file()
    assert report(copy, "two", "--output", "folder/x.html") == 0 and (tmp_path / "folder/x.html").is_file()
    capsys.readouterr()
    (tmp_path / "two" / "results.json").unlink()
    assert report(copy, "two") == 0 and "Note: two is not evaluated" in capsys.readouterr().err
    assert report("two") == 0 and "Note: There is no evaluation yet." in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.partial"))


def test_errors_of_the_command_are_one_sentence(copy, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine.html").write_text("somebody's")
    for argv, expected in (
        ([tmp_path / "nowhere"], "There is no folder"),
        ([tmp_path / "empty"], "holds nothing of a run"),
        ([copy, tmp_path / "empty"], "holds nothing of a run"),
        ([copy, copy], "named twice"),
        ([copy, "--output", tmp_path / "results.json"], "ends in .html"),
        ([copy, "--output", tmp_path / "mine.html"], "not a page of trl-ama"),
        ([copy, "--output", copy / "results.json/x.html"], "cannot be written"),
        ([], "required: DIR"),
    ):
        with pytest.raises(SystemExit) as raised:
            report(*argv)
        assert raised.value.code == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("trl ama-report: error: ") and expected in line
    assert (tmp_path / "mine.html").read_text() == "somebody's"


def test_neither_torch_nor_transformers_is_imported(finished):
    code = (
        "import sys; from trl_ama.report.page import write_page; write_page(sys.argv[1]);"
        "assert not {'torch', 'transformers', 'datasets', 'peft', 'accelerate'} & set(sys.modules)"
    )
    environ = {"PYTHONPATH": str(Path(cli.__file__).parents[1]), "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", code, str(finished)], check=True, env=environ)


# ---- A real run ----


def test_every_run_leaves_its_page(model_dir, tmp_path, monkeypatch, capsys):
    write_pairs(tmp_path)
    recipe = write_recipe(
        tmp_path / "recipe.yaml", model_name_or_path=model_dir, tasks=[{"task": task, "path": "json", "eval_split": "test"} for task in SIZES],
        tasks_dir=str(tmp_path), hub_token="hf_" + "secret" * 5, compare=["uniform"],
    )  # fmt: skip
    run = tmp_path / "run"
    arguments = lambda: parse(recipe, "--output_dir", run)  # noqa: E731
    run_pipeline(*arguments(), stages=("specialists",))
    page = words((run / "report/index.html").read_text(encoding="utf-8"))
    assert "specialist list done, 4 steps" in page and "reference losses list not there" in page
    results = run_pipeline(*arguments())
    assert f"Page:    {run / 'report' / 'index.html'}" in capsys.readouterr().out
    page = (run / "report/index.html").read_text(encoding="utf-8")
    for policy in results["policies"].values():
        assert all(f'data-value="{figures["margin"]!r}"' in page for figures in policy["by_task"].values())
    assert (
        "secret" not in page.replace("Secrets are left out", "") and str(tmp_path) not in (run / NOTE_FILE).read_text()
    )
    data = collect(run)
    assert data["strategies"] == ["ama_s", "uniform"] and "mixing: ama_s" in data["recipe"]
    assert set(data["examples"]) == set(SIZES), data["missing"]
    assert data["missing"] == []
    assert all(pair["texts"] for pairs in data["examples"].values() for pair in pairs)


def test_a_page_that_fails_does_not_stop_a_run(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from trl_ama.common.run_folder import RunFolder
    from trl_ama.pipeline.note import leave_page

    def fail(*args):
        raise ValueError("broken on purpose")

    monkeypatch.setattr("trl_ama.pipeline.note.run_note", fail)
    with pytest.warns(UserWarning, match="page was not written.*broken on purpose"):
        assert leave_page(SimpleNamespace(recipe=None, inputs=None, folder=RunFolder(tmp_path)), {}) is None


def test_render_needs_no_folder(finished):
    assert render_run(collect(finished)) == page_of(finished)
    with pytest.raises(AMAError):
        collect(finished / "nowhere")
