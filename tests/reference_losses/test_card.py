"""Cards and notes that somebody else wrote, read back when reference losses are pushed."""

import pytest
from card_checks import MARKER, NASTY, TEXT, check_body, front_matter
from forgery import copied, edit_note, honest_losses, readable
from huggingface_hub import DatasetCard, HfApi

from trl_ama import AMAError, load_reference_losses


DOC = "The author's own text.\n"
PRESENT = {
    "nothing": ("", None),
    "no front matter": (DOC, None),
    "unfinished front matter": ("---\ntags: [x]\n" + DOC, None),
    "CRLF": (f"---\r\nlicense: mit\r\n---\r\n\r\n{DOC}", "mit"),
    "a mark of byte order": (f"\ufeff---\nlicense: mit\n---\n{DOC}", "mit"),
    "dashes": (f"---\nlicense: mit\ntitle: a---\n---\n{DOC}", "mit"),
    "spaces": (f"--- \nlicense: mit\n--- \n{DOC}", "mit"),
    "empty": (f"---\n---\n{DOC}", None),
    "other tags": (f"---\nlicense: mit\ntags: x\nconfigs: {{a: 1}}\n---\n{DOC}", "mit"),
    "a number of configs": (f"---\nlicense: mit\ntags: 5\nconfigs: 5\n---\n{DOC}", "mit"),
    "odd configs": (
        f"---\nlicense: mit\nconfigs: [5, {{config_name: [x]}}, {{config_name: {{}}}}]\n---\n{DOC}",
        "mit",
    ),
    "a date": (f"---\nlicense: mit\ndate: 2020-01-01\nset: !!set {{a, b}}\n---\n{DOC}", "mit"),
    "our markers": (f"{DOC}<!-- trl-ama: runs -->\nlost", None),
}


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    return honest_losses(tmp_path_factory.mktemp("honest"))


@pytest.mark.parametrize("name", PRESENT)
def test_a_card_of_somebody_else_is_kept(hub, losses, name, tmp_path, monkeypatch):
    content, license = PRESENT[name]
    hub.write("dataset", "org/losses", {"README.md": DOC})
    card = tmp_path / "README.md"
    card.write_bytes(content.encode())
    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "hf_hub_download", lambda *args, **kwargs: str(card))
        load_reference_losses(str(losses)).push_to_hub("org/losses")
    text = hub.tree("dataset", "org/losses")["README.md"].decode()
    data = front_matter(text)
    assert data.get("license") == license and set(data["trl_ama"]) == {"default"}
    assert content in ("",) or DOC.strip() in text
    assert "lost" not in content or "lost" in text
    check_body(text[4:].split("\n---\n", 1)[1])
    load_reference_losses("org/losses").push_to_hub("org/losses")  # and what was written can be read again
    assert hub.tree("dataset", "org/losses")["README.md"].decode() == text


BROKEN = {
    "no YAML": "tags: [",
    "no text": b"\xff\xfe",
    "a tab": "\tx: 1",
    "python": "x: !!python/object/apply:os.system ['touch trap']",
    "python name": "x: !!python/name:os.system",
    "no date": "date: 2020-99-99",
    "deep": "x: " + "[" * 5000 + "]" * 5000,
    "a list": "[a, b]",
    "a text": "abc",
    "runs a list": "trl_ama: [default]",
    "runs a text": "trl_ama: default",
    "runs a number": "trl_ama: 5",
    "a run a text": "trl_ama: {default: x}",
    "another run a text": "trl_ama: {other: x}",
    "no tasks": "trl_ama: {other: {made_with: {}}}",
    "tasks a list": "trl_ama: {default: {tasks: [list]}}",
    "a task a text": "trl_ama: {other: {tasks: {list: x}}}",
    "rows a text": "trl_ama: {other: {tasks: {list: {rows: x}}}}",
    "made with a list": "trl_ama: {default: {made_with: [x], tasks: {list: {}}}}",
    "a base a list": "trl_ama: {other: {made_with: {base_model: [x]}, tasks: {}}}",
    "a specialist a list": "trl_ama: {other: {tasks: {list: {specialist: [x]}}}}",
    "names that are numbers": "trl_ama: {1: {tasks: {}}}",
    "itself": "trl_ama: &a {other: {made_with: {x: *a}, tasks: {}}}",
    "a billion laughs": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    + "trl_ama: {other: {made_with: {x: *i}, tasks: {}}}",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_card_that_cannot_be_kept(hub, losses, name, tmp_path, monkeypatch):
    """Refused in a sentence; nothing is written, no code is run."""
    front = BROKEN[name]
    content = front if isinstance(front, bytes) else f"---\n{front}\n---\n{DOC}".encode()
    card = tmp_path / "card" / "README.md"
    card.parent.mkdir()
    card.write_bytes(content)
    # Not by way of the server, which reads the metadata of cards itself
    monkeypatch.setattr(HfApi, "hf_hub_download", lambda *args, **kwargs: str(card))
    hub.write("dataset", "org/losses", {"README.md": DOC})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AMAError) as caught:
        load_reference_losses(str(losses)).push_to_hub("org/losses")
    readable(caught.value, "The card of 'org/losses'", "README.md")
    assert hub.tree("dataset", "org/losses")["README.md"].decode() == DOC
    assert list(tmp_path.iterdir()) == [card.parent]


def test_losses_of_a_stranger_pushed_again(hub, losses, tmp_path):
    """What a stranger's note says goes into the card of whoever pushes those losses again."""
    folder = copied(losses, tmp_path)
    for task in ("list", "sort"):
        edit_note(
            folder / task,
            lambda note: note["fingerprint"].update(
                {"base_model": NASTY, "specialist": NASTY, "data": f"x](http:evil)@{'0' * 40}", NASTY: TEXT, "x": ""}
            ),
        )
    load_reference_losses(str(folder)).push_to_hub("org/losses", config_name="a-b")
    text = hub.tree("dataset", "org/losses")["README.md"].decode()
    assert set(front_matter(text)) == {"tags", "configs", "trl_ama"}
    card = DatasetCard.load("org/losses")
    columns = check_body(card.text, blocks=["python", "yaml"])
    assert columns.count(5) == 3 and set(columns) == {2, 5}
    assert card.text.count(MARKER) == 2
    load_reference_losses("org/losses").push_to_hub("org/losses")
