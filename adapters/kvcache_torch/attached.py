"""What stands in for a module's method while it is attached."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["AttachedForward", "plain_forward"]


class AttachedForward:
    """Stands in for a module's ``forward`` while it is attached. Copies and pickles as the plain one.

    A subclass does the same for the method it names.

    Args:
        module: the module.
        enter: called as ``enter(original, args, kwargs)`` instead of the module's own forward.
    """

    name = "forward"

    def __init__(self, module: nn.Module, enter: Callable[..., Any]) -> None:
        self.module = module
        self.enter = enter
        self.original = getattr(module, self.name)
        self.was_own_attribute = self.name in vars(module)
        self.__wrapped__ = self.original  # who asks for the signature gets the module's own

    @classmethod
    def install(cls, module: nn.Module, enter: Callable[..., Any]) -> None:
        """Put one in place of the module's forward."""
        setattr(module, cls.name, cls(module, enter))

    @classmethod
    def uninstall(cls, module: nn.Module) -> None:
        """Undo :meth:`install`."""
        attached = getattr(module, cls.name)
        try:
            if not attached.was_own_attribute:
                delattr(module, cls.name)
                return
        except AttributeError:  # a traced module has its attributes elsewhere
            pass
        setattr(module, cls.name, attached.original)

    @property
    def __code__(self) -> Any:
        """Where ``torch.export`` looks for the names of the arguments."""
        return self.original.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module does when it is called."""
        return self.enter(self.original, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _class_method(memo[id(self.module)], self.name)

    def __reduce__(self) -> Any:
        return _class_method, (self.module, self.name)


def _class_method(model: nn.Module, name: str) -> Callable[..., Any]:
    return types.MethodType(getattr(type(model), name), model)


def plain_forward(model: nn.Module) -> Callable[..., Any]:
    """The model's own forward, attached or not."""
    forward = model.forward
    return forward.original if isinstance(forward, AttachedForward) else model
