"""What libraries work out again and again, and which does not change while tests run: worked out once in a process.

A fifth of a short run's time went there: what is installed is read from the disk for each call of a model under an adapter, and
looked for on the path by each Trainer; the template of a model card is compiled for each checkpoint; data sets disassemble each
function that they map, pickle each name and number to know whether it is another one, read the types of their columns anew and
copy them attribute by attribute; and a plot of a few steps is laid out three times. Nor does a test wait for the disk, or for the text
of a stack that nobody reads.
"""

import copy
import functools
import gc
import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import accelerate.utils.imports
import dill.detect
import jinja2
import pyarrow
import torch
from datasets import Json
from datasets.features import ClassLabel, Features, LargeList, List, Value
from datasets.fingerprint import Hasher
from matplotlib.figure import Figure


# How a figure is really drawn, for tests of plots; every other test gets a picture that was drawn before
DRAW = {"savefig": Figure.savefig, "tight_layout": Figure.tight_layout}

_is_kept: list[bool] = []
_UNCHANGING = (str, int, type(None), pyarrow.DataType)


def keep() -> None:
    """Keep metadata of packages, which there are, compiled templates, the names of globals in functions, fingerprints of plain
    values, types of columns, and a plot; and do not wait for the disk, nor write down where a seed was set. Once: also in a fork
    of a process that does."""
    if _is_kept:
        return
    _is_kept.append(True)
    _keep_metadata()
    _keep_packages()
    _keep_templates()
    _keep_globals()
    _keep_hashes()
    _copy_types()
    _keep_types()
    _keep_a_plot()
    _spare_the_disk()
    _spare_the_stack()


def keep_and_freeze() -> None:
    """The same in a process of a test's own, when it has imported what it needs. Modules are for ever: every Trainer collects
    garbage before it trains, and would look at all of them."""
    keep()
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


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


def _keep_packages() -> None:
    plain = accelerate.utils.imports._is_package_available

    @functools.lru_cache(256)
    def kept(names, *where):
        return plain(*names)

    def available(*names):
        # A test may hide a package, or have another path
        return kept(names, importlib.util.find_spec, importlib.metadata.metadata, tuple(sys.path))

    accelerate.utils.imports._is_package_available = available


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


def _keep_hashes() -> None:
    plain = Hasher.hash

    @functools.lru_cache(4096)
    def kept(kind, value):
        return plain(value)

    def hash(value):
        return kept(type(value), value) if type(value) in (str, int, bool, type(None)) else plain(value)

    Hasher.hash = staticmethod(hash)


def _copy_types() -> None:
    """A data set copies the types of its columns for whoever looks at them: the same copies, without pickling and parsing them."""

    def attributes(self, memo):
        return {
            name: value if isinstance(value, _UNCHANGING) else copy.deepcopy(value, memo)
            for name, value in self.__dict__.items()
        }

    def copied(self, memo):
        new = object.__new__(type(self))
        new.__dict__.update(attributes(self, memo))
        return new

    def copied_features(self, memo):
        new = type(self).__new__(type(self))
        dict.update(new, {name: copy.deepcopy(value, memo) for name, value in self.items()})
        new.__dict__.update(attributes(self, memo))
        return new

    for kind in (Value, List, LargeList, ClassLabel, Json):
        kind.__deepcopy__ = copied
    Features.__deepcopy__ = copied_features


def _keep_types() -> None:
    plain, kept = Features.from_arrow_schema, {}

    def from_arrow_schema(cls, pa_schema):
        if cls is not Features:
            return plain.__func__(cls, pa_schema)
        key = pa_schema.serialize().to_pybytes()  # with what data sets have noted in it
        if key not in kept:
            kept[key] = plain(pa_schema)
        return kept[key].copy()

    Features.from_arrow_schema = classmethod(from_arrow_schema)


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


def _spare_the_disk() -> None:
    """What is written need not reach the disk to be read again, as no test takes the power away."""

    def fsync(file):
        os.fstat(file if isinstance(file, int) else file.fileno())  # one that is not open is still an error

    os.fsync = fsync


def _spare_the_stack() -> None:
    """A seed is noted for each kind of device that is not in use yet, with the whole stack, which takes a millisecond: without it."""
    for device in (torch.cuda, torch.mtia, torch.xpu):
        device.traceback = SimpleNamespace(format_stack=list)
