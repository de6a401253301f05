"""The documentation as a site: `make docs`. The source folder is the repository's root, so that pages may link to recipes."""

import sys
from importlib import metadata
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent / "_sphinx"))

project = "trl-ama"
author = "The trl-ama authors"
copyright = "the trl-ama authors, Apache 2.0"
try:
    release = metadata.version("trl-ama")
except metadata.PackageNotFoundError:  # a source tree that was not installed
    release = ""

extensions = ["myst_parser", "ama_reference"]
root_doc = "docs/index"
include_patterns = ["docs/*.md", "recipes/README.md", "recipes/*/README.md", "README.md", "CHANGELOG.md"]
exclude_patterns = [".*", "docs/README.md", "outputs", "venv", "build", "dist", "runs", "data", "tests", "trl_ama"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
highlight_language = "none"  # of blocks that name none: formulas and trees of files
nitpicky = True

html_theme = "furo"
html_title = "trl-ama"
html_static_path = ["_static"]
html_css_files = ["trl_ama.css"]
html_copy_source = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#9a5b00", "color-brand-content": "#8a4b00"},
    "dark_css_variables": {"color-brand-primary": "#ffb454", "color-brand-content": "#ffb454"},
}


def start_page(app, name, source):
    """On GitHub the documentation begins at `docs/README.md`, which is a part of the site's own first page."""
    source[0] = source[0].replace("docs/README.md", "docs/index.md")


def setup(app):
    app.connect("source-read", start_page)
