"""What the kernels in C++ share: how Python calls their functions, and how these become operations of torch."""

import ctypes
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor

from gemlet.kernels.build import library

P = ParamSpec("P")
R = TypeVar("R")

_operations = torch.library.Library("gemlet", "FRAGMENT")


def operation(function: Callable[P, R]) -> "OpOverload[P, R]":
    """A function of tensors on a CPU as the operation `gemlet::NAME`: it changes none, and those it returns are new.

    It leaves what is computed to `call`, so that it also tells torch what comes of tensors without data. The same by
    `torch.library.custom_op` looks at every call whether it keeps its word, which takes 12 us, for what a step does a
    hundred times.
    """
    name = function.__name__
    _operations.define(name + torch.library.infer_schema(function, mutates_args=()))
    _operations.impl(name, function, "CPU")
    torch.library.register_fake(f"gemlet::{name}", function, lib=_operations)
    return getattr(torch.ops.gemlet, name).default


def differentiable(operation: OpOverload, save: Callable[..., None]) -> Callable[[Callable[..., Any]], None]:
    """Make a function the way back of an operation, from what `save(ctx, inputs, output)` has saved."""

    def register(back: Callable[..., Any]) -> None:
        torch.library.register_autograd(operation.name(), back, setup_context=save, lib=_operations)

    return register


def call(of: str, name: str, *arguments: Any, result: Any = None) -> Any:
    """Call a function of a library that is there, unless a tensor is one without data.

    It gets a pointer for a tensor (a null one for None), an int64_t for a whole number, a float for a fraction, an
    array of them for a list, and at last, as an int, how many threads there are.
    """
    converted = []
    for argument in arguments:
        if isinstance(argument, FakeTensor) or (isinstance(argument, list) and isinstance(argument[0], FakeTensor)):
            return None
        converted.append(_converted(argument))
    return _function(of, name, result)(*converted, ctypes.c_int(torch.get_num_threads()))


def of_dtype(name: str, dtype: torch.dtype) -> str:
    """How a function for each of several types of numbers is called for one of them."""
    return f"{name}_{str(dtype).removeprefix('torch.')}"


def _converted(x: Any) -> Any:
    if x is None or isinstance(x, Tensor):
        return ctypes.c_void_p(None if x is None else x.data_ptr())
    if isinstance(x, list):
        values = [_converted(y) for y in x]
        kind: Any = type(values[0])
        return (kind * len(values))(*values)
    return ctypes.c_float(x) if isinstance(x, float) else ctypes.c_int64(x)


@functools.cache
def _function(of: str, name: str, result: Any) -> Callable[..., Any]:
    found = library(of)
    assert found is not None, "ask whether it is available"
    function = found[name]
    function.restype = result
    return function
