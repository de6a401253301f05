"""The page of a run in a real browser: its script runs, nothing else does, it fits a phone, and it reads out its charts.

Nothing but a Chromium is needed: a few lines of script look at the page from within and leave what they find in its DOM,
which the browser prints.
"""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from made_runs import HOSTILE, make_run, write

from trl_ama.common.run_folder import NOTE_FILE
from trl_ama.report.page import write_comparison, write_page


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars"
).split()
# In <iframe>s, as a window has a smallest width of its own; one after the other, as only one has the focus
FRAMES = """<!DOCTYPE html><meta charset="utf-8">
<pre id="found"></pre>
<script>
const views = [{views}], all = [];
const look = () => {{
  if (all.length === views.length) {{
    document.getElementById("found").textContent = JSON.stringify(all);
    return;
  }}
  const view = views[all.length], page = document.createElement("iframe");
  page.style = `width: ${{view.width}}px; height: 4000px; border: 0`;
  page.srcdoc = view.page;
  page.onload = () => setTimeout(() => {{
    let found;
    try {{ found = view.check(page.contentWindow, page.contentDocument); }} catch (error) {{ found = String(error); }}
    all.push(found);
    page.remove();
    look();
  }}, 300);
  document.body.append(page);
}};
look();
</script>
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome on the PATH"),
]


class View(NamedTuple):
    """A page in a window of some width, and what a JavaScript function of window and document finds there."""

    page: str
    check: str
    width: int = 1100
    policy: bool = True

    def script(self) -> str:
        page, count = self.page, 1
        if not self.policy:
            page, count = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
        assert count == 1
        text = json.dumps(page).replace("<", "\\u003c")
        return f"{{width: {self.width}, page: {text}, check: ({self.check})}}"


def browse(folder: Path, views: list[View], flags: tuple[str, ...] = ()) -> list:
    """What is found in each view, all of them in one browser."""
    path = folder / "frames.html"
    path.write_text(FRAMES.format(views=",\n".join(view.script() for view in views)), encoding="utf-8")
    command = [BROWSER, *FLAGS, *flags, f"--user-data-dir={folder / 'profile'}"]
    command += [f"--virtual-time-budget={8000 + 1000 * len(views)}", "--dump-dom", path.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=240)
    found = re.search(r'(?s)<pre id="found">(.*?)</pre>', result.stdout)
    assert found and found[1], result.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    long = "x" * 60 + "-without-a-break-" + "y" * 500
    return make_run(tmp_path_factory.mktemp("runs") / "mine", texts=[long, "short", "several\nlines " * 200])


@pytest.fixture(scope="module")
def pages(folder, tmp_path_factory) -> dict[str, str]:
    other = make_run(tmp_path_factory.mktemp("runs") / "other", seed=1)
    comparison = write_comparison([folder, other], tmp_path_factory.mktemp("page") / "both.html")
    unfinished = shutil.copytree(folder, tmp_path_factory.mktemp("runs") / "unfinished")
    for name in ("generalists", "reference_losses", "results.json"):
        path = unfinished / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return {
        "run": write_page(folder).read_text(encoding="utf-8"),
        "comparison": comparison.read_text(encoding="utf-8"),
        "unfinished": write_page(unfinished).read_text(encoding="utf-8"),
    }


FITS = """(window, document) => {
  document.querySelectorAll("details").forEach((one) => { one.open = true; });
  const wide = [...document.querySelectorAll("body *")].filter((one) =>
    !one.closest(".scroll *, .unseen, .skip, .values") && one.getBoundingClientRect().right > window.innerWidth + 0.5);
  return {
    ready: document.documentElement.dataset.ready,
    width: window.innerWidth,
    scroll: document.documentElement.scrollWidth,
    wide: wide.map((one) => one.outerHTML.slice(0, 200)),
    scripts: document.querySelectorAll("script").length,
  };
}"""
CONTRASTS = """(window, document) => {
  const light = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number).map((one) => one / 255)
    .map((one) => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4)
    .reduce((sum, one, place) => sum + one * [0.2126, 0.7152, 0.0722][place], 0);
  const contrast = (one, two) => { const [a, b] = [light(one), light(two)]; return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); };
  const style = (one) => window.getComputedStyle(one);
  const page = style(document.body).backgroundColor;
  const text = ["body", "a[href='#results']", "small, .small", "summary", ".empty", "caption"]
    .map((name) => document.querySelector(name)).filter(Boolean).map((one) => contrast(style(one).color, page));
  const worst = style(document.querySelector(".is-worst"));
  text.push(contrast(worst.color, worst.backgroundColor));
  const curves = [0, 1, 2, 3, 4, 5, 6, 7].map((number) => {
    const one = document.body.appendChild(document.createElement("i"));
    one.className = `c${number}`;
    return contrast(style(one).color, page);
  });
  return { text: Math.min(...text), curves: Math.min(...curves), page: light(page) };
}"""
READS_OUT = """(window, document) => {
  const plot = document.querySelector("#chart-0-weight .plot");
  const read = () => { const values = plot.querySelector(".values"); return values.hidden ? null : values.textContent; };
  const press = (key) => plot.dispatchEvent(new window.KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
  const seen = [read()];
  plot.focus(); seen.push(read());
  press("Home"); seen.push(read());
  press("ArrowRight"); seen.push(read());
  press("Escape"); seen.push(read());
  const frame = plot.querySelector("svg").getBoundingClientRect();
  plot.dispatchEvent(new window.PointerEvent("pointermove", { clientX: frame.left + frame.width * 0.999, clientY: frame.top + 5 }));
  seen.push(read());
  const buttons = [...document.querySelectorAll(".copy")];
  return { seen, focusable: plot.tabIndex, live: plot.querySelector(".values").getAttribute("role"),
           copy: buttons.map((one) => [one.hidden, one.textContent, one.parentElement.querySelectorAll("code").length]) };
}"""


@pytest.fixture(scope="module")
def found(pages, tmp_path_factory) -> dict:
    """What is found in pages that are as they are, by what was looked for, page and width."""
    views = {("fits", name, width): View(page, FITS, width) for name, page in pages.items() for width in (375, 800)}
    views |= {"charts": View(pages["run"], READS_OUT), "contrast": View(pages["run"], CONTRASTS)}
    return dict(zip(views, browse(tmp_path_factory.mktemp("found"), [*views.values()]), strict=True))


@pytest.mark.parametrize("width", [375, 800])
@pytest.mark.parametrize("name", ["run", "comparison", "unfinished"])
def test_fits_without_scrolling_sideways(found, name, width):
    """Only tables may be wider than the screen, in containers that scroll; and the script has run, policy and all."""
    expected = {"ready": "yes", "width": width, "scroll": width, "wide": [], "scripts": 2}
    assert found["fits", name, width] == expected


def test_charts_read_out_their_values(found, folder):
    found = found["charts"]
    log = json.loads((folder / "generalists/ama_s/trainer_state.json").read_text())["log_history"]

    def said(entry):
        figures = (f"{task} {float(format(entry[f'ama/weight/{task}'], '.4g')):g}" for task in ("helpful", "code"))
        return f"step {entry['step']}" + "".join(figures)

    assert found["seen"] == [None, said(log[-1]), said(log[0]), said(log[1]), None, said(log[-1])]
    assert found["focusable"] == 0 and found["live"] == "status"
    assert len(found["copy"]) >= 5 and all(one[0] is False and one[2] == 1 for one in found["copy"])


DOES_NOTHING = """(window, document) => {
  document.querySelectorAll("details").forEach((one) => { one.open = true; });
  document.querySelectorAll(".plot").forEach((one) => { one.focus(); });
  document.querySelectorAll("body *").forEach((one) => {
    for (const kind of ["mouseover", "focus", "load", "error"]) one.dispatchEvent(new window.Event(kind));
  });
  return {
    sentinel: String(window.sentinel) + String(window.parent.sentinel),
    ready: document.documentElement.dataset.ready,
    scripts: document.querySelectorAll("script").length,
    foreign: document.querySelectorAll("img, iframe, base, object, [src], [onload], [onerror], [onfocus]").length,
    said: document.body.textContent.includes("<script>window.sentinel = 1</" + "script>"),
    here: window.location.href,
  };
}"""


@pytest.fixture(scope="module")
def found_of_hostile(tmp_path_factory) -> dict[bool, list]:
    """What is found in pages full of hostile texts, with the policy of the page and without it."""
    folder, names = tmp_path_factory.mktemp("hostile"), [*HOSTILE, "harmless"]
    run = make_run(folder / "run", tasks=names, strategies=["ama_s", HOSTILE[0].replace("/", "")], texts=HOSTILE)
    write(run / NOTE_FILE, {"recipe": "\n".join(HOSTILE), "arguments": " ".join(HOSTILE), "base_model": HOSTILE[1],
                            "mixing": "ama_s", "data": {HOSTILE[0]: HOSTILE[1]}, "published": {"": HOSTILE[4]}})  # fmt: skip
    other = shutil.copytree(run, folder / "other")
    paths = [write_page(run), write_comparison([run, other], folder / "both.html")]
    pages = [path.read_text(encoding="utf-8") for path in paths]
    found = browse(folder, [View(page, DOES_NOTHING, policy=policy) for policy in (True, False) for page in pages])
    return {True: found[:2], False: found[2:]}


@pytest.mark.parametrize("policy", [True, False], ids=["as it is", "without its policy"])
def test_hostile_texts_do_nothing(found_of_hostile, policy):
    """They would not even if the page's policy let them."""
    expected = {"sentinel": "undefinedundefined", "ready": "yes", "scripts": 2, "foreign": 0, "said": True,
                "here": "about:srcdoc"}  # fmt: skip
    assert found_of_hostile[policy] == [expected, expected]


def test_the_check_would_see_a_script_that_runs(pages, tmp_path):
    """Else the test above could not fail."""
    check = "(window) => String(window.sentinel)"
    page = pages["run"].replace("<main", "<script>window.sentinel = 1</script><main", 1)
    views = [View(page, check, policy=False), View(page, check)]
    assert browse(tmp_path, views) == ["1", "undefined"]  # the policy holds


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_contrast(found, pages, tmp_path, dark):
    view = View(pages["run"], CONTRASTS)
    found = browse(tmp_path, [view], ("--blink-settings=preferredColorScheme=0",))[0] if dark else found["contrast"]
    assert found["text"] >= 4.5 and found["curves"] >= 3
    assert found["page"] < 0.05 if dark else found["page"] > 0.95


def test_prints(folder, pages, tmp_path):
    path, printed = tmp_path / "page.html", tmp_path / "page.pdf"
    path.write_text(pages["run"], encoding="utf-8")
    command = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--print-to-pdf={printed}", path.as_uri()]
    subprocess.run(command, capture_output=True, timeout=240, check=True)
    assert printed.read_bytes().startswith(b"%PDF")
