"""What makes a host wait for a GPU, and what is launched on one, counted on any machine.

On a CPU, its tensors stand for those of a device. Usage: `with Waits() as waits: …`, then `waits.count` or, for messages, `waits.seen`.
"""

from collections import Counter
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


# A number, or a size, that only the device knows
_WAITS = {
    "aten::_local_scalar_dense",  # item, bool, float
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::unique_dim",
    "aten::bincount",
    "aten::repeat_interleave.Tensor",
}
_INDEXED = {
    "aten::index.Tensor",
    "aten::index_put",
    "aten::index_put_",
    "aten::_index_put_impl_",
}  # by a mask: nonzero
# They hand over memory, and compute nothing
_MEMORY = {"aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty_strided"}
_NO_KERNEL = {"aten::detach", "aten::alias", "aten::_unsafe_view", "aten::_reshape_alias", "aten::lift_fresh"}


class _Copies(TorchFunctionMode):
    """Copies to the host: of a tensor of the CPU, nothing is dispatched."""

    def __init__(self, note: Any):
        super().__init__()
        self._note = note

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in ("cpu", "tolist") and getattr(torch.Tensor, name) is func:
            self._note(f"Tensor.{name}", args)
        return func(*args, **(kwargs or {}))


class Waits(TorchDispatchMode):
    """While open, counts what a host would wait for.

    Args:
        device (`str`): The type of the tensors that count.

    Attributes:
        seen (`Counter`): How often, by operation.
    """

    def __init__(self, device: str = "cpu"):
        super().__init__()
        self._device = device
        self.seen: Counter[str] = Counter()
        self._copies = _Copies(self._note)

    @property
    def count(self) -> int:
        """All of them."""
        return self.seen.total()

    def __enter__(self):
        self._copies.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._copies.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        masks = any(
            isinstance(leaf, torch.Tensor) and leaf.dtype in (torch.bool, torch.uint8)
            for leaf in (tree_leaves(args[1]) if name in _INDEXED else [])
        )
        if name in _WAITS or masks:
            self._note(name, args)
        return func(*args, **(kwargs or {}))

    def _note(self, name: str, args: Any) -> None:
        if any(isinstance(leaf, torch.Tensor) and leaf.device.type == self._device for leaf in tree_leaves(args)):
            self.seen[name] += 1


class Kernels(TorchDispatchMode):
    """While open, counts the operations that would launch something: neither views nor new memory.

    Attributes:
        seen (`Counter`): How often, by operation.
    """

    def __init__(self):
        super().__init__()
        self.seen: Counter[str] = Counter()

    @property
    def count(self) -> int:
        """All of them."""
        return self.seen.total()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition(".")[0]
        if not (func.is_view or name in _MEMORY or name in _NO_KERNEL):
            self.seen[func.name()] += 1
        return func(*args, **(kwargs or {}))
