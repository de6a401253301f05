"""The page of a run as text: its numbers, what it escapes and hides, what it says of missing pieces, and several runs on one."""

import html
import json
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_world import SIZES, parse, write_pairs, write_recipe
from made_runs import FINGERPRINT, HOSTILE, STRATEGIES, TASKS, make_run, write

from trl_ama import AMAError, cli, run_pipeline
from trl_ama.html_charts import kept_rows, nice_ticks
from trl_ama.html_page import LARGEST, render_run, script_json, visible, write_comparison, write_page
from trl_ama.html_report import MASK, collect, masked
from trl_ama.recipe_text import public_arguments
from trl_ama.run_names import MARGINS_FILE, NOTE_FILE


class Tree(HTMLParser):
    """The page's elements with their attributes, the text of each, and whether every one is closed."""

    VOID = {"meta", "br", "img", "link", "input"}

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open[-3:])
        self.open.pop()

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(folder: Path) -> str:
    return write_page(folder).read_text(encoding="utf-8")


def words(page: str) -> str:
    """What is to be read on a page."""
    body = re.sub(r"(?s)<(script|style)[ >].*?</\1>", "", page)
    body = re.sub(r"</?(?:b|bdi|code|em|small|span|strong)\b[^>]*>", "", body)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "mine")


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "mine")


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


def test_numbers_are_those_of_the_results(finished):
    results = json.loads((finished / "results.json").read_text())
    page = page_of(finished)
    for key in ("accuracy", "excess", "margin"):
        table = re.search(rf'(?s)<table class="results" data-figure="{key}">.*?</table>', page)[0]
        columns = re.findall(r'<th scope="col"><bdi>(.*?)</bdi>', table)
        assert columns == list(results["policies"])
        rows = {}
        for row in re.findall(r"(?s)<tr[^>]*><th scope=\"row\">.*?</tr>", table):
            rows[re.search("<bdi>(.*?)</bdi>", row)[1]] = re.findall(r'data-value="(.*?)"', row)
        assert list(rows)[:2] == ["worst task", "mean of tasks"]
        for task in TASKS:
            assert rows[task] == [repr(results["policies"][name]["by_task"][task][key]) for name in columns]
        summary = [results["policies"][name]["summary"] for name in columns]
        assert rows["worst task"] == [repr(one[f"worst_{key}"]) for one in summary]
        assert rows["mean of tasks"] == [repr(one[f"mean_{key}"]) for one in summary]
        order = [results["policies"]["ama_s"]["by_task"][task][key] for task in list(rows)[2:]]
        assert order == sorted(order, reverse=key == "excess")


def test_curves_are_those_of_the_log(finished):
    data = json.loads(re.search(r'(?s)id="charts">(.*?)</script>', page_of(finished))[1])
    assert len(data["charts"]) == len(STRATEGIES) * 4
    log = json.loads((finished / "generalists/ama_s/trainer_state.json").read_text())["log_history"]
    chart = data["charts"]["chart-0-weight"]
    assert chart["names"] == TASKS and chart["steps"] == [entry["step"] for entry in log]
    for task, values in zip(TASKS, chart["values"], strict=True):
        assert values == pytest.approx([entry[f"ama/weight/{task}"] for entry in log], rel=1e-3)


def test_specialists_and_their_errors(finished):
    run = collect(finished)
    for row in run["specialists"]:
        margins = pq.read_table(finished / MARGINS_FILE).to_pandas().query(f"task == '{row['task']}'")["specialists"]
        losses = np.log1p(np.exp(-margins))
        assert row["loss_stderr"] == pytest.approx(losses.std(ddof=1) / np.sqrt(len(losses)), rel=1e-4)
        assert row["base_loss"] == pytest.approx(np.log(2))


def test_warning_as_the_run_gives_it(finished):
    from trl_ama.specialists import quality_warning

    folder = finished
    for row in collect(folder)["specialists"]:
        result = json.loads((folder / "specialists" / row["task"] / "stage.json").read_text())["result"]
        assert (row["warning"] is None) == (quality_warning(row["task"], result) is None)
    page = page_of(folder)
    assert page.count('class="warning"') == sum(row["warning"] is not None for row in collect(folder)["specialists"])


@pytest.mark.parametrize(("accuracy", "loss", "warns"), [(0.9, 0.3, False), (0.6, 0.3, True), (0.9, 0.7, True)])
def test_warning(copy, accuracy, loss, warns):
    path = copy / "specialists/code/stage.json"
    stage = json.loads(path.read_text())
    stage["result"] |= {"eval_accuracy": accuracy, "eval_loss": loss}
    write(path, stage)
    assert (collect(copy)["specialists"][1]["warning"] is not None) == warns


def test_examples_are_the_largest_differences(finished):
    run = collect(finished)
    table = pq.read_table(finished / MARGINS_FILE).to_pandas()
    for task in TASKS:
        own = table[table["task"] == task]
        difference = (own["specialists"] - own["ama_s"]).abs()
        expected = own.loc[difference.sort_values(ascending=False).index[:4], "pair_id"].tolist()
        assert [pair["pair_id"] for pair in run["examples"][task]] == expected
        pair = run["examples"][task][0]
        row = own[own["pair_id"] == pair["pair_id"]].iloc[0]
        assert pair["margins"] == {name: row[name] for name in ("specialists", *STRATEGIES)}
        assert pair["texts"]["chosen"][0][0] == "assistant" and pair["texts"]["prompt"][0][1].startswith("list ")


def test_long_texts_are_cut(tmp_path):
    page = page_of(make_run(tmp_path / "mine", texts=["x" * 9000 + "END"] * 12))
    assert "8603 more characters" in page and "are not shown" in page and "END" not in page
    assert "x" * 4001 not in page


def test_secrets_are_masked(copy):
    path = copy / "generalists/ama_s/stage.json"
    stage = json.loads(path.read_text())
    token = "hf_" + "aB3" * 10
    stage["fingerprint"] |= {"hub_token": "h1dden", "list": [{"password": "h1dden"}], "note": f"see {token}"}
    write(path, stage)
    write(copy / NOTE_FILE, {"recipe": f"run_name: {token}", "arguments": f"--run_name {token}", "mixing": "ama_s"})
    page = page_of(copy)
    assert not re.search(r"sesame|h1dden|aB3", page)
    assert page.count(MASK) >= 3 and "&lt;pad&gt;" in page
    assert masked({"a": {"api_key": 1, "pad_token": "x"}}) == {"a": {"api_key": MASK, "pad_token": "x"}}
    assert masked({"secret": None}) == {"secret": None}  # nothing to hide


def test_commands_hide_secrets_and_folders():
    script = str(Path(cli.__file__).parent / "scripts" / "ama.py")
    argv = [script, "--config", "/home/me/my recipe.yaml", "--hub_token", "s3cret", "--hub_token=s3cret", "--seed", "3",
            "--model_init_kwargs", '{"token": "s3cret"}', "--run_name", "hf_" + "x" * 20, "--output_dir", "outputs/it's"]  # fmt: skip
    text = public_arguments(argv)
    assert "s3cret" not in text and "x" * 20 not in text and "/home" not in text
    assert "--config 'my recipe.yaml'" in text and "--seed 3" in text and "--output_dir 'outputs/it'\"'\"'s'" in text
    assert public_arguments(["/usr/bin/pytest", "--token", "x"]) is None and public_arguments([]) is None


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


# ---- Missing pieces ----


@pytest.mark.parametrize(
    ("gone", "sentence"),
    [
        ("results.json", "There is no evaluation yet. Run trl ama-eval --config …."),
        ("generalists", "No generalist is trained yet"),
        (MARGINS_FILE, "The margins of single held-out pairs were not kept"),
        ("reference_losses", "The reference losses hold no texts of helpful, code"),
        ("generalists/ama_s/trainer_state.json", "The generalist ama_s has no log yet."),
        ("specialists", "Specialists"),
        ("report", "The recipe was not noted"),
    ],
)
def test_missing_pieces_are_named(copy, gone, sentence):
    path = copy / gone
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() or gone == "report" else path.unlink()
    assert sentence in words(page_of(copy))


def test_only_specialists(copy):
    for name in ("generalists", "reference_losses", "results.json", MARGINS_FILE):
        path = copy / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    write(copy / "specialists/code/stage.json", {"fingerprint": {}, "result": None})
    write(copy / "specialists/code/checkpoint-5/trainer_state.json", {})
    page = words(page_of(copy))
    assert "not finished, last checkpoint at step 5" in page and "specialist helpful done, 7 steps" in page


def test_run_in_progress_shows_its_last_checkpoint(copy):
    folder = copy / "generalists/ama_s"
    for step in (9, 10):
        write(folder / f"checkpoint-{step}/trainer_state.json", {"log_history": [
            {"step": number, "ama/weight/code": 0.5} for number in range(1, step)]})  # fmt: skip
    (folder / "trainer_state.json").unlink()
    write(folder / "stage.json", {"fingerprint": FINGERPRINT, "result": None})
    run = collect(copy)
    assert run["history"]["ama_s"]["steps"] == list(range(1, 10))
    assert "The generalist ama_s is not finished, last checkpoint at step 10." in run["missing"]
    assert ("generalist", "ama_s", "not finished, last checkpoint at step 10") in run["stages"]


@pytest.mark.parametrize("content", ["{", "[]", "null", "1e999", '{"policies": []}', '{"policies": {"x": {"by_task": 3}}}',
                                     '{"tasks": [1], "policies": {"x": {"by_task": {"a": {"accuracy": "high"}}}}}',
                                     '{"log_history": [{"step": 1e9, "ama/weight/code": 1}, {"step": -1}, 3], "result": 4}',
                                     '{"fingerprint": [], "result": {"eval_pairs": -3, "eval_accuracy": 7, "steps": "x"}}',
                                     "[" * 100_000, "\x00"])  # fmt: skip
def test_damaged_files_are_named_and_left_out(copy, content):
    for path in copy.rglob("*.json"):
        path.write_text(content)
    page = page_of(copy)
    assert Tree(page).open == []
    if content in ("{", "[]"):
        assert "results.json is damaged and was left out." in words(page)


@pytest.mark.parametrize(
    "name", ["results.json", "generalists/ama_s/stage.json", MARGINS_FILE, "reference_losses/code/test.parquet"]
)
def test_files_that_are_something_else(copy, name):
    (copy / name).unlink()
    (copy / name).mkdir()
    assert Tree(page_of(copy)).open == []
    (copy / name).rmdir()
    (copy / name).write_bytes(b"PAR1 not really PAR1")
    assert Tree(page_of(copy)).open == []


def test_margins_of_another_evaluation_are_not_shown(copy):
    table = pq.read_table(copy / MARGINS_FILE)
    column = table.schema.get_field_index("ama_s")
    pq.write_table(table.set_column(column, "ama_s", pa.array(np.ones(len(table)))), copy / MARGINS_FILE)
    assert "are of another evaluation" in words(page_of(copy)) and not collect(copy)["examples"]


def test_names_in_files_are_no_paths(copy):
    """A stranger's run that names a folder outside of it."""
    results = json.loads((copy / "results.json").read_text())
    shutil.copytree(copy / "specialists/code", copy.parent / "outside")
    results["tasks"] = ["../../outside", "../outside"]
    write(copy / "results.json", results)
    assert all(row["steps"] is None for row in collect(copy)["specialists"])


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


def test_thinned_curves_keep_ends_and_spikes():
    steps = np.arange(10_000.0)
    values = np.stack([np.zeros(10_000), np.sin(steps / 900)], axis=1)
    values[4321, 0] = 1.0
    values[::2, 1] = np.nan
    rows = kept_rows(steps, values, 100)
    assert len(rows) == 100 and rows[0] == 0 and rows[-1] == 9999 and 4321 in rows
    assert (np.diff(rows) > 0).all()
    assert kept_rows(steps[:5], values[:5], 100).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.003), (-2.2, 7), (0, 0), (0, 1e6), (1, 10_000)])
def test_ticks(low, high):
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 8 and ticks[0] <= low and ticks[-1] >= high
    assert np.allclose(np.diff(ticks), ticks[1] - ticks[0])


# ---- Several runs ----


def test_comparison(finished, tmp_path):
    other = make_run(tmp_path / "other", seed=1)
    stage = other / "generalists/ama_s/stage.json"
    note = json.loads(stage.read_text())
    note["fingerprint"]["learning_rate"] = 3e-4
    write(stage, note)
    write(other / NOTE_FILE, {"recipe": "mixing: ama_s\nsmoothing: 0.2\n", "mixing": "ama_s"})
    path = write_comparison([finished, other], tmp_path / "both.html")
    page = path.read_text(encoding="utf-8")
    tree = Tree(page)
    assert tree.open == []
    text = words(page)
    assert "2 differ" in text and "learning_rate 0.0001 0.0003" in text and "smoothing not set 0.2" in text
    assert "The held-out pairs of helpful are not the same in all runs" in text
    for folder in (finished, other):
        for policy in ("ama_s", "specialists"):
            for figures in json.loads((folder / "results.json").read_text())["policies"][policy]["by_task"].values():
                assert f'data-value="{figures["accuracy"]!r}"' in page
    charts = json.loads(re.search(r'(?s)id="charts">(.*?)</script>', page)[1])["charts"]
    assert len(charts) == 4 * len(TASKS)
    lines = ["mine: ama_s", "mine: proportional", "other: ama_s", "other: proportional"]
    assert all(chart["names"] == lines for chart in charts.values())


def test_comparison_of_runs_with_one_name_and_other_tasks(finished, tmp_path):
    other = make_run(tmp_path / "mine", tasks=["code", "maths"], seed=1)
    (other / "results.json").unlink()
    text = words(write_comparison([finished, other], tmp_path / "both.html").read_text(encoding="utf-8"))
    assert f"{other} is not evaluated (evaluation held-out pairs not there)." in text
    assert f"{finished} has no task maths." in text and f"{other} has no task helpful." in text
    assert "over the tasks that all evaluated runs have" in text
    assert "reference_losses.helpful" not in text and "reference_losses.code" not in text  # no difference of settings


def test_worst_task_and_mean_are_over_the_same_tasks_in_all_runs(finished, tmp_path):
    other = make_run(tmp_path / "other", tasks=["code", "maths"], seed=1)
    page = write_comparison([finished, other], tmp_path / "both.html").read_text(encoding="utf-8")
    table = re.search(r'(?s)<table class="results" data-figure="accuracy">.*?</table>', page)[0]
    found = {
        name: re.findall(r'data-value="(.*?)"', re.search(rf"(?s)<bdi>{name}</bdi></th>(.*?)</tr>", table)[1])
        for name in ("worst common task", "mean of common tasks", "code", "maths")
    }
    assert found["worst common task"] == found["mean of common tasks"] == found["code"]  # of all columns, both runs'
    assert len(found["code"]) == 6 and len(found["maths"]) == 3 and "worst task" not in words(table)


def test_comparison_of_a_run_that_is_half_done(finished, tmp_path):
    other = make_run(tmp_path / "other", seed=0)
    stage = other / "generalists/proportional/stage.json"
    write(stage, {"fingerprint": FINGERPRINT, "result": None})
    text = words(write_comparison([finished, other], tmp_path / "both.html").read_text(encoding="utf-8"))
    assert "other is not complete (generalist proportional not finished)." in text
    assert "are not the same in all runs" not in text


def test_runs_without_a_common_task_are_not_compared(finished, tmp_path):
    other = make_run(tmp_path / "other", tasks=["maths"], seed=1)
    with pytest.raises(AMAError, match=r"The run '.*' has the tasks \['maths'\], and no other run has one of them"):
        write_comparison([finished, finished.parent / "mine", other], tmp_path / "both.html")
    assert not (tmp_path / "both.html").exists()


# ---- The command ----


def report(*argv) -> int:
    return cli.main(["ama-report", *map(str, argv)])


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
        "import sys; from trl_ama.html_page import write_page; write_page(sys.argv[1]);"
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

    from trl_ama.run_names import RunFolder
    from trl_ama.run_note import leave_page

    def fail(*args):
        raise ValueError("broken on purpose")

    monkeypatch.setattr("trl_ama.run_note.run_note", fail)
    with pytest.warns(UserWarning, match="page was not written.*broken on purpose"):
        assert leave_page(SimpleNamespace(recipe=None, inputs=None, folder=RunFolder(tmp_path)), {}) is None


def test_render_needs_no_folder(finished):
    assert render_run(collect(finished)) == page_of(finished)
    with pytest.raises(AMAError):
        collect(finished / "nowhere")
