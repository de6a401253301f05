"""State files of another version, and what is said of them."""

import re

from trl_ama.common.files import read_json, write_json
from trl_ama.common.versions import VERSIONS


def with_version(path, version):
    """Rewrites a file as of another version; of none for `None`."""
    content = read_json(path)
    content.pop("version")
    write_json(path, content if version is None else {"version": version, **content})


def refused(name, version=99):
    return rf"{re.escape(name)}' is of version {version}, this trl-ama reads version {VERSIONS[name]}\. Update trl-ama, or "
