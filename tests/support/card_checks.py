"""Texts that try to be code in a card, and what no card may have in it."""

import yaml
from markdown_it import MarkdownIt


NASTY = "a|b<script>`{{7*7}}`![x](http:evil)\n---\n# [y](z) $x$ _name"  # a file name can be all of this


MARKER = "<!-- trl-ama: end -->"


# What only a card's author may bring
TEXT = f"```\n---\n{MARKER}\n<img src=x onerror=alert(1)>\n<!-- trl-ama: loading -->\n~~~"


def tokens(text):
    """All tokens of a card's body, those within paragraphs and cells too."""
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        yield token
        yield from token.children or ()


def check_body(text, *, links=(), images=(), blocks=None):
    """No HTML but our own comments, no link or image to elsewhere, whole tables."""
    ours = ("https://huggingface.co/", "https://github.com/huggingface/trl", *links)
    columns, found = [], []
    for token in tokens(text):
        if token.type in ("html_block", "html_inline"):
            assert not token.content.replace("<!-- trl-ama: ", "").strip(" \n->abcdefghijklmnopqrstuvwxyz"), (
                token.content
            )
        if token.type == "link_open":
            assert token.attrs["href"].startswith(ours), token.attrs
        if token.type == "image":
            assert token.attrs["src"] in images, token.attrs
        if token.type == "fence":
            found.append(token.info)
        if token.type == "tr_open":
            columns.append(0)
        if token.type in ("td_open", "th_open"):
            columns[-1] += 1
        assert token.type != "em_open", text  # nothing of ours is in italics
    if blocks is not None:
        assert found == blocks, (found, text)
    return columns


def front_matter(text):
    """The metadata, which nothing has ended too early."""
    assert text.startswith("---\n")
    data = yaml.safe_load(text[4:].split("\n---\n", 1)[0])
    assert isinstance(data, dict)
    return data
