"""The one place where hooks are put on modules, and are surely taken off again.

Hooks observe. What a callback returns is dropped, so that a module's output stays the same, bit for
bit. All hooks are registered on entering and removed on leaving, after success, an exception or
Ctrl-C.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Literal

from torch import nn

When = Literal["input", "output"]
Watch = tuple[nn.Module, When, Callable[[Any], None]]


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
