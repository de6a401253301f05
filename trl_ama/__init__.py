"""AutoMixAlign for TRL: several preference datasets in, one balanced model out.

Names are listed in pipeline order and imported when first used, so `import trl_ama` costs next to nothing.
"""

import contextlib
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any


_EXPORTS = {
    "TaskConfig": "tasks.config",
    "TaskMixtureConfig": "tasks.config",
    "load_tasks": "tasks.loading",
    "train_specialist": "pipeline.specialists",
    "compute_reference_losses": "pipeline.losses",
    "join_reference_losses": "reference_losses.columns",
    "load_reference_losses": "reference_losses.loading",
    "ReferenceLosses": "reference_losses.dataset",
    "MixingStrategy": "mixing",
    "StepStatistics": "mixing",
    "AMAConfig": "dpo.config",
    "AMATrainer": "dpo.ama_trainer",
    "evaluate_policies": "pipeline.evaluation",
    "run_pipeline": "pipeline.run",
    "AMAError": "common.errors",
    "__version__": "common.versions",
}

if TYPE_CHECKING:
    from .common.errors import AMAError
    from .common.versions import __version__
    from .dpo.ama_trainer import AMATrainer
    from .dpo.config import AMAConfig
    from .mixing import MixingStrategy, StepStatistics
    from .pipeline.evaluation import evaluate_policies
    from .pipeline.losses import compute_reference_losses
    from .pipeline.run import run_pipeline
    from .pipeline.specialists import train_specialist
    from .reference_losses.columns import join_reference_losses
    from .reference_losses.dataset import ReferenceLosses
    from .reference_losses.loading import load_reference_losses
    from .tasks.config import TaskConfig, TaskMixtureConfig
    from .tasks.loading import load_tasks

__all__ = [*_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _TRLAwaited:
    """Waits on `sys.meta_path` for somebody to import `trl`, which takes half a second that a mistake in a recipe can do without."""

    _asks = False  # the others, of whom one may ask the others in turn

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "trl" or self._asks:
            return None
        self._asks = True
        try:
            specs = (other.find_spec(name, path, target) for other in list(sys.meta_path) if other is not self)
            spec = next((spec for spec in specs if spec is not None), None)
        finally:
            self._asks = False
        loader = spec.loader if spec is not None else None
        exec_module = getattr(loader, "exec_module", None)

        def exec_and_register(module: ModuleType) -> None:
            with contextlib.suppress(AttributeError):
                del loader.exec_module  # it may load other modules, too
            exec_module(module)
            sys.meta_path[:] = [other for other in sys.meta_path if other is not self]
            _register_with_trl()

        if exec_module is not None:
            with contextlib.suppress(
                AttributeError
            ):  # of a loader that takes none: our names are then in `trl_ama` only
                loader.exec_module = exec_and_register
        return spec


def _register_with_trl() -> None:
    """Make `from trl import AMAConfig, AMATrainer` work, as lazily as TRL's own names."""
    trl = sys.modules["trl"]
    # TRL's lazy module finds a name's submodule in this table and imports it as `trl.<submodule>`
    if hasattr(trl, "_class_to_module"):
        sys.modules.setdefault("trl.ama", sys.modules[__name__])
        trl._class_to_module.update(AMAConfig="ama", AMATrainer="ama")


# By name: of a module that is loaded again, the classes are others
sys.meta_path[:] = [
    one for one in sys.meta_path if f"{type(one).__module__}.{type(one).__name__}" != f"{__name__}._TRLAwaited"
]
if "trl" in sys.modules:
    _register_with_trl()
else:
    sys.meta_path.insert(0, _TRLAwaited())  # first, because Python's own finder answers for every module on the path
