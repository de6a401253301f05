"""`make gpu` without a card: its cheap parts run, what a part dies of is told, every mark can be missed, and the docs take figures in."""

import copy
import importlib.util
import json
import sys

import pytest
from places import DOCS, TESTS


GPU = TESTS / "benchmarks" / "gpu"
sys.path += [str(GPU), str(GPU.parent)]

from gpu_marks import judge  # noqa: E402
from gpu_parts import LIMIT, PARTS  # noqa: E402
from gpu_report import Report  # noqa: E402
from gpu_tables import BEGIN, END, section, tables  # noqa: E402


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", GPU / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


driver = load("run")


def rehearsed(name: str, folder) -> dict:
    """What a part finds in this process, as its worker would write it."""
    report = Report(folder / f"{name}.json", 300, rehearse=True)
    module, _, function = PARTS[name].function.partition(".")
    getattr(importlib.import_module(module), function)(report, *PARTS[name].arguments)
    report.end("done")
    return json.loads(report.path.read_text())


# ---- Parts ----


@pytest.mark.parametrize("name", ["attention", "exact"])
def test_cheap_parts_meet_their_marks_on_a_cpu(name, tmp_path):
    marks = judge({name: rehearsed(name, tmp_path)}, rehearsal=True)
    assert [mark for mark in marks if not mark["met"]] == []
    assert {"error", "gradient error"} <= {mark["mark"] for mark in marks}


def test_without_a_card_nothing_is_measured_and_the_reason_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "--output", str(tmp_path), "--parts", "env"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert driver.main() == 0
    assert "sees no CUDA device" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "gpu.json").read_text())["parts"]) == ["env"]


@pytest.mark.parametrize(
    ("program", "seconds", "why"),
    [
        (
            "import os; print('assert failed', flush=True); os.abort()",
            20,
            "ended by signal 6; its last line: assert failed",
        ),
        ("raise SystemExit('no such device')", 20, "exit code 1; its last line: no such device"),
        ("import time; time.sleep(60)", 0.5, "not done after 0 s"),
    ],
)
def test_what_a_part_dies_of_is_told(program, seconds, why, tmp_path):
    before = "import json; open('{}', 'w').write(json.dumps(dict(status='running', rows=[dict(case='first')], notes={{}})));"
    file = tmp_path / "part.json"
    found = driver.run_part([sys.executable, "-S", "-c", f"{before.format(file)}\n{program}"], file, seconds, {})
    assert found["status"] == "failed" and found["why"].startswith(why)
    if seconds > 1:  # what it had is kept
        assert found["rows"] == [{"case": "first"}]


def test_all_parts_fit_into_the_limit():
    assert sum(part.seconds for part in PARTS.values()) <= LIMIT
    for part in PARTS.values():
        assert (GPU / f"{part.function.partition('.')[0]}.py").exists()


# ---- Marks ----


def found() -> dict:
    """Figures that meet every mark."""

    def part(*rows):
        return {"status": "done", "rows": [{"case": "8B", **row} for row in rows], "notes": {}, "seconds": 1.0}

    paths = {"fast": 3, "plain": 0}
    exact = {"type": "bfloat16", "error": 5e-3, "gradient error": 0.02, "plain path: gradient error": 0.018, **paths}
    return {
        "attention": part(
            {"type": "float32", "way": "fast path", "error": 1e-6, "gradient error": 1e-5},
            {"type": "float32", "way": "of somebody else", "error": 1.0, "gradient error": 1.0},
        ),
        "exact": part(exact),
        "steps-8B": part(
            {"length": 1024, "ours / trl": 0.49, "ours GiB": 7.0, "trl GiB": 8.0, **paths},
            {"length": 256, "ours / trl": 1.04, "ours GiB": 7.0, "trl GiB": 7.0, **paths},
        ),
        "memory": part({"planned / measured": 0.92}),
        "resume": part({"case": "full_determinism", "same bits": True}, {"case": "without it", "same bits": False}),
        "fsdp": part({"log-probs": "float32", **paths}),
        "tests": part({"passed": 40}),
    }


def test_good_figures_meet_every_mark():
    marks = judge(found(), rehearsal=False)
    assert all(mark["met"] for mark in marks)
    assert {"ran", "error", "gradient error", "fast path", "time", "memory", "plan", "same bits"} <= {
        m["mark"] for m in marks
    }


@pytest.mark.parametrize(
    ("part", "row", "change", "missed"),
    [
        ("attention", 0, {"error": 2e-4}, "error"),
        ("exact", 0, {"error": 1.1e-2}, "error"),
        ("exact", 0, {"gradient error": 0.03}, "gradient error"),
        ("exact", 0, {"error": float("nan")}, "error"),
        ("exact", 0, {"plain": 1}, "fast path"),
        ("fsdp", 0, {"fast": 0}, "fast path"),
        ("fsdp", 0, {"log-probs": "bfloat16"}, "log-probs in float32"),
        ("steps-8B", 0, {"ours / trl": 0.51}, "time"),
        ("steps-8B", 1, {"ours / trl": 1.06}, "time"),
        ("steps-8B", 1, {"ours GiB": 7.1}, "memory"),
        ("memory", 0, {"planned / measured": 1.11}, "plan"),
        ("memory", 0, {"planned / measured": 0.89}, "plan"),
        ("resume", 0, {"same bits": False}, "same bits"),
        ("tests", 0, {"failed": "RuntimeError: 1 did not pass"}, "ran"),
    ],
)
def test_each_mark_can_be_missed(part, row, change, missed):
    parts = copy.deepcopy(found())
    parts[part]["rows"][row] |= change
    assert [mark["mark"] for mark in judge(parts, rehearsal=False) if not mark["met"]] == [missed]


@pytest.mark.parametrize(("status", "missed"), [("failed", ["ran"]), ("not begun", ["ran"]), ("skipped", [])])
def test_a_part_that_did_not_end_is_a_mark_missed_and_one_without_its_packages_is_not(status, missed):
    parts = {"steps-8B": {"status": status, "why": "because", "rows": [], "notes": {}}}
    assert [mark["mark"] for mark in judge(parts, rehearsal=False) if not mark["met"]] == missed


# ---- The docs ----


def test_figures_that_were_sent_go_into_the_marked_section(tmp_path, monkeypatch, capsys):
    env = {"status": "done", "rows": [], "notes": {"card": "RTX 4090", "gib": 23.6, "versions": {"torch": "2.13.0"}}}
    result = {"rehearsal": False, "parts": {"env": env, **found()}, "marks": []}
    result["parts"]["steps-8B"]["rows"][0]["ours / trl"] = 0.6
    sent, page = tmp_path / "sent.json", tmp_path / "speed.md"
    sent.write_text(json.dumps(result))
    page.write_text(f"# Speed\n\n{BEGIN}\nold\n{END}\n\nThe end \\1.\n")
    monkeypatch.setattr(sys, "argv", ["run.py", "--from", str(sent), "--docs", str(page)])
    assert driver.main() == 1  # a mark is missed
    text = page.read_text()
    assert text.startswith(f"# Speed\n\n{BEGIN}") and text.endswith(f"{END}\n\nThe end \\1.\n") and "old" not in text
    assert "### RTX 4090, 23.6 GiB (torch 2.13.0)" in text and "| time | steps-8B | 8B | 0.6 | 0.5 |" in text
    never = text[text.index("Never run on a card") :]
    assert "`quickstart`" in never and "`steps-8B`" not in never
    assert "RTX 4090" in capsys.readouterr().out


def test_a_rehearsal_does_not_go_into_the_docs(tmp_path, monkeypatch):
    sent = tmp_path / "sent.json"
    sent.write_text(json.dumps({"rehearsal": True, "parts": {}, "marks": []}))
    monkeypatch.setattr(sys, "argv", ["run.py", "--from", str(sent), "--docs", str(tmp_path / "speed.md")])
    with pytest.raises(SystemExit, match="rehearsal"):
        driver.main()


def test_the_page_tells_of_every_part_whether_it_ran():
    page = (DOCS / "speed.md").read_text(encoding="utf-8")
    inside = page[page.index(BEGIN) : page.index(END)]
    assert all(f"`{name}`" in inside for name in PARTS)
    if "### " not in inside:  # figures of no card
        assert section([]).strip() in inside


def test_a_table_has_a_column_for_whatever_a_row_says():
    part = {
        "status": "failed",
        "why": "a | b",
        "rows": [{"case": "a", "x": 12345.6}, {"case": "b", "y": True}],
        "notes": {},
    }
    lines = tables({"rehearsal": False, "parts": {"env": part}, "marks": []})
    assert lines[-3:] == ["| --- | ---: | ---: |", "| a | 12,346 |  |", "| b |  | yes |"]
