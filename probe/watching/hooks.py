"""The one place where hooks are put on modules, and are surely taken off again.

There are two doors. `Hooks` observe: what a callback returns is dropped, so that a module's output
stays the same, bit for bit. `editing_hooks` use what it returns; they come before all that observe.
All hooks are registered on entering and removed on leaving, after success, an exception or Ctrl-C.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, Literal

import torch
from torch import nn

When = Literal["input", "output"]
Watch = tuple[nn.Module, When, Callable[[Any], None]]
Change = tuple[nn.Module, When, Callable[[torch.Tensor], torch.Tensor]]


class Hooks:
    """Watch modules while a `with` block lasts.

    `(module, "output", f)` calls f with the module's output, `"input"` with its first argument:

        with Hooks([(unet.mid_block, "output", print)]):
            unet(...)
    """

    def __init__(self, watches: Iterable[Watch]):
        self._watches = list(watches)
        self._stack = ExitStack()

    def __enter__(self) -> Hooks:
        with ExitStack() as stack:
            for module, when, callback in self._watches:
                register = _on_input if when == "input" else _on_output
                stack.callback(register(module, callback).remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()


@contextmanager
def editing_hooks(changes: Iterable[Change]) -> Iterator[None]:
    """Change what goes through modules while a `with` block lasts.

    `(module, "output", f)` puts f(x) in place of the module's output x, or of the first tensor of
    several; `"input"` in place of its first argument. Changes of one module are made in their
    order, and whoever watches sees the changed value.
    """
    with ExitStack() as stack:
        for module, when, change in reversed(list(changes)):  # each is put before the others
            register = _before if when == "input" else _after
            stack.callback(register(module, change).remove)
        yield


def _before(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    def hook(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        first = next(iter(kwargs))
        return args, {**kwargs, first: change(kwargs[first])}

    return module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)


def _after(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return change(output)
        return (change(output[0]), *output[1:])

    return module.register_forward_hook(hook, prepend=True)


def _on_input(module: nn.Module, callback: Callable[[Any], None]) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        callback(args[0] if args else next(iter(kwargs.values())))

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _on_output(module: nn.Module, callback: Callable[[Any], None]) -> Any:
    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        callback(output)

    return module.register_forward_hook(hook)


def count(module: nn.Module) -> int:
    """Return how many forward hooks are on a module and everything inside it."""
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())
