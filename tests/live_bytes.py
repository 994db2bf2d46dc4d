"""The bytes of the tensors that live while code runs, also on the meta device."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all living tensors made while it is active, but for those of `module`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._known = {id_of(tensor) for tensor in (*module.parameters(), *module.buffers())}
        self._views: dict[int, int] = {}

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and id_of(tensor) not in self._known:
                self._count(tensor)
        return made

    def _count(self, tensor: Tensor) -> None:
        storage, num_bytes = id_of(tensor), tensor.untyped_storage().nbytes()
        if storage not in self._views:
            self._now += num_bytes
            self.peak = max(self.peak, self._now)
        self._views[storage] = self._views.get(storage, 0) + 1
        weakref.finalize(tensor, self._forget, storage, num_bytes)

    def _forget(self, storage: int, num_bytes: int) -> None:
        self._views[storage] -= 1
        if not self._views[storage]:
            del self._views[storage]
            self._now -= num_bytes


def id_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
