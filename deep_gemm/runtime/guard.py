"""Whether tensors are like others that came before, in all but where they lie: one comparison for all of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

modes_at_work: Callable[[], int] = torch._C._len_torch_dispatch_stack  # pyright: ignore


def guard(tensors: Sequence[torch.Tensor]) -> Callable[..., bool]:
    """A function of as many objects, which tells whether each is like the tensor in its place.

    Alike are type, dtype, device, shape and strides, layout, whether a view negates its memory, and whether gradients
    are wanted; and PyTorch must dispatch on both in one way. Of modes that watch, ask modes_at_work: while one is at
    work on an operator, what is dispatched looks as if it were not. What is no tensor may raise TypeError. The tensors
    are not kept.

    The guards of torch.compile compare so, in C++, in a fraction of the time; they are not a public interface.
    """
    try:
        from torch._C._dynamo.guards import TensorGuards  # pyright: ignore
    except ImportError:
        wanted = described(tensors)
        return lambda *others: described(others) == wanted
    return TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check


def described(tensors: Sequence[Any]) -> list[Any]:
    """What guard compares, without those of torch.compile."""
    modes = modes_at_work()
    return [
        (type(x), x.dtype, x.device, x.shape, x.stride(), _keys(x).raw_repr(), x.requires_grad, modes) for x in tensors
    ]


class _Thread(threading.local):
    """within: whether an operator of ours is at work, of which nobody wants to see a second one."""

    within = False


_thread = _Thread()
_NONE: Any = torch._C._disabled_torch_dispatch_impl  # pyright: ignore
_modes_before_dispatch: Callable[[], int] = torch._ops._len_torch_dispatch_stack_pre_dispatch  # pyright: ignore
_transforms: Callable[[], Any] = torch._C._functorch.maybe_current_level  # pyright: ignore
_keys: Callable[[torch.Tensor], Any] = torch._C._dispatch_keys  # pyright: ignore


def watched(*things: Any) -> bool:
    """Whether a call is to become an operator (operators.py) and is none yet: for PyTorch wants to see operators.

    Where a mode traces or counts, torch.func transforms, or one of the things, tensors or pairs of tensors, is of a
    class that stands for something.
    """
    if modes_at_work() or _modes_before_dispatch() or _transforms() is not None:
        return not _thread.within
    tensors = (x for thing in things for x in (thing if isinstance(thing, (tuple, list)) else (thing,)))
    return any(getattr(type(x), "__torch_dispatch__", _NONE) is not _NONE for x in tensors) and not _thread.within


@contextmanager
def unwatched() -> Generator[None]:
    """For what is already an operator."""
    before, _thread.within = _thread.within, True
    try:
        yield
    finally:
        _thread.within = before
