"""What libraries work out again and again, and which does not change while tests run: worked out once in a process.

A sixth of a short run's time went there: what is installed is read from the disk for each call of a model under an adapter, the
template of a model card is compiled for each checkpoint, data sets disassemble each function that they map, and a plot of a few
steps is laid out three times. Data sets copy the types of their columns, down to each, whenever they are asked for one.
"""

import functools
import importlib.metadata
from pathlib import Path

import dill.detect
import jinja2
from datasets import ClassLabel, Json, Value
from matplotlib.figure import Figure


# How a figure is really drawn, for tests of plots; every other test gets a picture that was drawn before
DRAW = {"savefig": Figure.savefig, "tight_layout": Figure.tight_layout}


def keep() -> None:
    """Keep metadata of packages, compiled templates, the names of globals in functions, and a plot."""
    _keep_metadata()
    _keep_templates()
    _keep_globals()
    _keep_a_plot()
    _keep_types()


def _keep_metadata() -> None:
    plain, kept = importlib.metadata.Distribution.metadata.fget, {}

    def metadata(self):
        path = getattr(self, "_path", None)
        if not isinstance(path, Path) or not (path / "METADATA").is_file():
            return plain(self)
        now = (path / "METADATA").stat()
        key = (path, now.st_mtime_ns, now.st_size)  # a test may write its own
        if key not in kept:
            kept[key] = plain(self)
        return kept[key]

    importlib.metadata.Distribution.metadata = property(metadata)


def _keep_templates() -> None:
    plain = jinja2.Environment.compile

    @functools.lru_cache(256)
    def compiled(environment, source, name, filename):
        return plain(environment, source, name, filename)

    def compile(self, source, name=None, filename=None, raw=False, defer_init=False):
        # Environments that are shared are never changed
        if raw or defer_init or not self.shared or not isinstance(source, str):
            return plain(self, source, name, filename, raw, defer_init)
        return compiled(self, source, name, filename)

    jinja2.Environment.compile = compile


def _keep_globals() -> None:
    plain = dill.detect.nestedglobals

    @functools.lru_cache(4096)
    def names(code):
        return tuple(plain(code))

    def nestedglobals(func, recurse=True):
        code = dill.detect.code(func)
        return list(names(code)) if code is not None and recurse else plain(func, recurse)

    dill.detect.nestedglobals = nestedglobals


def _keep_a_plot() -> None:
    drawn: list[bytes] = []

    def savefig(self, path, *args, **kwargs):
        if not drawn:
            DRAW["savefig"](self, path, *args, **kwargs)
            drawn.append(Path(path).read_bytes())
        Path(path).write_bytes(drawn[0])

    def tight_layout(self, *args, **kwargs):
        if not drawn:
            DRAW["tight_layout"](self, *args, **kwargs)

    Figure.savefig, Figure.tight_layout = savefig, tight_layout


def _keep_types() -> None:
    for kind in (Value, ClassLabel, Json):  # which nobody changes once it is made
        kind.__deepcopy__ = lambda self, memo: self
