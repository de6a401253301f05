"""The numbers on the page of a run, its curves, warnings and examples, and several runs side by side."""

import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from made_runs import STRATEGIES, TASKS, Tree, copy_fixture, finished_fixture, make_run, page_of, words, write  # noqa: F401 - fixtures

from trl_ama import AMAError
from trl_ama.common.run_folder import MARGINS_FILE, NOTE_FILE
from trl_ama.report.charts import kept_rows, nice_ticks
from trl_ama.report.collect import collect
from trl_ama.report.page import write_comparison


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
    from trl_ama.pipeline.specialists import quality_warning

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


def test_runs_without_a_common_task_are_not_compared(finished, tmp_path):
    other = make_run(tmp_path / "other", tasks=["maths"], seed=1)
    with pytest.raises(AMAError, match=r"The run '.*' has the tasks \['maths'\], and no other run has one of them"):
        write_comparison([finished, finished.parent / "mine", other], tmp_path / "both.html")
    assert not (tmp_path / "both.html").exists()
