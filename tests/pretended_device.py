"""A CUDA device without a GPU: it finds misplaced tensors, waits of the host, and copies.

Inside `pretended_cuda()` a tensor on cuda:0 is a PretendedTensor, which keeps its values on the
CPU. Every operation runs on these values, after what CUDA refuses has been refused: operands on two
devices (except CPU scalars in pointwise operations and CPU indices), a generator of the CPU, matrix
products of integers, kernels for CPUs. Counts says how often the host waited for the device and
what was copied to it, by the line of minillava that asked for it. A blocking copy is also a wait.
It also counts what the host starts there: an operator, or a CUDA graph (PretendedGraph), in which
neither waits nor copies from the host are allowed.

It says nothing about kernels, numbers or speed of a real device.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
# Operators that wait for the device, and how often. multinomial checks the sum and the signs.
WAITS = {
    "_local_scalar_dense": 1,
    "equal": 1,
    "is_nonzero": 1,
    "item": 1,
    "masked_select": 1,
    "multinomial": 2,
    "nonzero": 1,
    "unique_consecutive": 1,
    "_unique2": 1,
}
COPIES = ("_to_copy", "copy_")
# Not pointwise, but they take a CPU scalar: the value of an assignment.
TAKE_SCALARS = ("index_put", "index_put_", "_index_put_impl_", "fill_", "copy_", "_to_copy")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "mv", "dot", "matmul")
# Functions that _Functions looks at, beside those with arguments by name.
SEEN = {
    Tensor.to,
    Tensor.cpu,
    Tensor.tolist,
    Tensor.numpy,
    Tensor.new_tensor,
    Tensor.__getitem__,
    Tensor.__setitem__,
    F.scaled_dot_product_attention,
}
CPU_ONLY = ("quantized::", "aten::_weight_int4pack_mm_for_cpu", "aten::mkldnn")


@dataclass
class Counts:
    """Waits of the host and copies to the device, by "file.py:line" of minillava."""

    waits: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)
    starts: int = 0  # operators and graphs
    recorded: PretendedGraph | None = None  # the graph that operators are recorded in now

    def wait(self, n: int = 1) -> None:
        self.waits[_line()] += n
        if self.recorded:
            raise RuntimeError(f"the host waits in a CUDA graph ({_line()})")

    def copy(self, blocking: bool) -> None:
        self.copies[_line()] += 1
        if self.recorded:
            raise RuntimeError(f"a copy from the host in a CUDA graph ({_line()})")
        if blocking:
            self.waits[_line()] += 1

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of an operator on values."""
        args, kwargs = values_of(args), values_of(kwargs)
        if self.recorded:
            return self.recorded.record(func, args, kwargs)
        self.starts += 1
        return func(*args, **kwargs)

    @contextmanager
    def record(self, graph: PretendedGraph, **_: Any) -> Iterator[None]:
        """torch.cuda.graph: operators do not change memory that was there before, until replay."""
        graph.counts, self.recorded = self, graph
        try:
            yield
        finally:
            self.recorded = None
            for storage, before in graph.changed.values():
                storage.copy_(before)

    @property
    def totals(self) -> tuple[int, int]:
        """Number of waits, and of copies to the device."""
        return self.waits.total(), self.copies.total()


def _line() -> str:
    frame: Any = sys._getframe()
    while frame is not None:
        _, package, name = frame.f_code.co_filename.rpartition("/minillava/")
        if package:
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside minillava"


class PretendedTensor(Tensor):
    """A tensor that says cuda:0. `values` is the tensor on the CPU that holds its values."""

    values: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: Tensor) -> PretendedTensor:
        with torch.inference_mode(False):  # views of tensors of the inference mode need no version
            self = Tensor._make_wrapper_subclass(
                cls,
                values.size(),
                strides=values.stride(),
                storage_offset=values.storage_offset(),
                dtype=values.dtype,
                device=CUDA,
            )
        self.values = values
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func}: a tensor of the pretended device outside pretended_cuda()")

    def __repr__(self, **_: Any) -> str:
        return f"PretendedTensor({self.values!r})"


class PretendedGenerator(torch.Generator):
    """A generator that says which device it is for, and draws on the CPU."""

    where: torch.device

    def __new__(cls, device: Any = "cpu") -> PretendedGenerator:
        self = super().__new__(cls)
        self.where = torch.device(device)
        return self


@dataclass
class PretendedGraph:
    """A torch.cuda.CUDAGraph: operators that are repeated on the same memory."""

    # operators with their arguments, and of each result the tensor if its memory is new
    calls: list[tuple[Any, Any, Any, list[Tensor | None]]] = field(default_factory=list)
    made: set[int] = field(default_factory=set)  # addresses of memory that operators made
    changed: dict[int, Any] = field(default_factory=dict)  # other memory that they write to
    counts: Counts = field(default_factory=Counts)

    def record(self, func: Any, args: Any, kwargs: Any) -> Any:
        schema = getattr(func, "_schema", None)  # scaled_dot_product_attention has none
        for i, argument in enumerate(schema.arguments if schema else ()):
            x = args[i] if i < len(args) else kwargs.get(argument.name)
            if argument.alias_info and argument.alias_info.is_write and x is not None:
                storage = x.untyped_storage()
                if storage.data_ptr() not in self.made | self.changed.keys():
                    self.changed[storage.data_ptr()] = storage, storage.clone()
        result = func(*args, **kwargs)
        there = {address(x) for x in tensors_of((args, kwargs))}
        results = [(x, address(x)) for x in tensors_of(result)]
        self.made |= {at for _, at in results} - there
        new = [None if at in there else x for x, at in results]  # no view, not changed in place
        self.calls.append((func, args, kwargs, new))
        return result

    def replay(self) -> None:
        self.counts.starts += 1
        # all of it was checked when it was recorded
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            for func, args, kwargs, new in self.calls:
                again = func(*args, **kwargs)
                for x, value in zip(new, tensors_of(again), strict=True):
                    if x is not None:
                        x.copy_(value)


def address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def change(function: Callable[[Any], Any], x: Any) -> Any:
    """The function of each argument, or of each result, of an operator: of those in lists too.

    torch's tree_map does the same and takes longer than the small operators of the tests.
    """
    kind = type(x)
    if kind is tuple or kind is list:
        return kind([change(function, i) for i in x])
    if kind is dict:
        return {key: change(function, value) for key, value in x.items()}
    return x if isinstance(x, tuple) else function(x)  # such as torch.Size


def leaves_of(x: Any) -> list[Any]:
    found: list[Any] = []
    _add_leaves(found, x)
    return found


def _add_leaves(found: list[Any], x: Any) -> None:
    kind = type(x)
    if kind is tuple or kind is list:
        for i in x:
            _add_leaves(found, i)
    elif kind is dict:
        for i in x.values():
            _add_leaves(found, i)
    elif not isinstance(x, tuple):
        found.append(x)


def tensors_of(x: Any) -> list[Tensor]:
    return [leaf for leaf in leaves_of(x) if isinstance(leaf, Tensor)]


def values_of(x: Any) -> Any:
    """The same arguments with tensors of the pretended device replaced by their values."""
    return change(lambda t: t.values if isinstance(t, PretendedTensor) else t, x)


def on_device(x: Any) -> Any:
    """The same results with all tensors on the pretended device."""
    return change(lambda t: PretendedTensor(t) if type(t) is Tensor else t, x)


@cache
def _is_composite(func: Any) -> bool:
    """Whether an operator is nothing but calls of others."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


@cache
def _takes_scalars(func: Any) -> bool:
    """Whether scalars on the CPU may be among its operands."""
    name = func._schema.name.partition("::")[2]
    return torch.Tag.pointwise in func.tags or name in TAKE_SCALARS


def _names_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class _Functions(TorchFunctionMode):
    """What has to be seen before torch looks for a driver: devices as arguments, lists, reads."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not kwargs and func not in SEEN:
            return func(*args)
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        there = isinstance(first, PretendedTensor)
        if func is Tensor.to:
            return self._move(*args, **kwargs)
        if func is Tensor.cpu:
            return self._move(first, CPU)
        if func in (Tensor.tolist, Tensor.numpy) and there:
            self.counts.wait()
            return func(first.values)
        if func is Tensor.new_tensor and there:
            self.counts.copy(blocking=True)
            return on_device(torch.tensor(*args[1:], **{"dtype": first.dtype} | kwargs))
        if func in (Tensor.__getitem__, Tensor.__setitem__) and there:
            args = (first, self._index(args[1]), *args[2:])
        generator = kwargs.get("generator")
        if isinstance(generator, PretendedGenerator):
            cuda = there or _names_cuda(kwargs.get("device"))
            if cuda != (generator.where.type == "cuda"):
                raise RuntimeError(
                    f"a generator of {generator.where} on another device ({_line()})"
                )
        if func is F.scaled_dot_product_attention:
            _refuse_mixed("scaled_dot_product_attention", leaves_of((args, kwargs)))
            return (
                on_device(self.counts.run(func, args, kwargs)) if there else func(*args, **kwargs)
            )
        if _names_cuda(kwargs.get("device")):
            if func in (torch.tensor, torch.as_tensor):
                self.counts.copy(blocking=True)
            kwargs["device"] = CPU
            return on_device(func(*args, **kwargs))
        return func(*args, **kwargs)

    def _index(self, index: Any) -> Any:
        """torch makes a tensor on the device of a list in an index."""
        if isinstance(index, list):
            self.counts.copy(blocking=True)
            return PretendedTensor(torch.tensor(index))
        return tuple(map(self._index, index)) if isinstance(index, tuple) else index

    def _move(self, x: Tensor, *args: Any, non_blocking: bool = False, **kwargs: Any) -> Tensor:
        """x.to(...): a copy to the device, a wait for it, or neither."""
        target = next((a for a in args if isinstance(a, str | torch.device)), None)
        target = kwargs.pop("device", target)
        flags = [a for a in args if isinstance(a, bool)]  # non_blocking, copy
        rest = [a for a in args if isinstance(a, torch.dtype | Tensor)]
        kwargs |= {"copy": flags[1]} if len(flags) > 1 else {}
        there = isinstance(x, PretendedTensor)
        goes = there if target is None else _names_cuda(target)
        values = x.values if there else x
        moved = values.to(*rest, **kwargs) if rest or kwargs else values
        if goes == there:
            return x if moved is values else (on_device(moved) if there else moved)
        if goes:
            self.counts.copy(blocking=not (non_blocking or any(flags[:1])))
        else:
            self.counts.wait()
        moved = moved.clone() if moved is values else moved
        return PretendedTensor(moved) if goes else moved


class _Operators(TorchDispatchMode):
    """Runs every operator on the values, after refusing what CUDA refuses."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        leaves = leaves_of((args, kwargs))
        there = [x for x in leaves if isinstance(x, PretendedTensor)]
        device = next((x for x in leaves if isinstance(x, torch.device)), None)
        if not there and not _names_cuda(device):
            return func(*args, **kwargs)
        if _is_composite(func):  # under inference_mode they come here in one piece
            with self:
                return func.decompose(*args, **kwargs)
        _, _, name = func._schema.name.partition("::")
        if there:
            self._check(func, name, args, kwargs, leaves)
        to_cpu = device is not None and device.type == "cpu"
        if name in COPIES and device is not None and to_cpu:
            self.counts.wait()
        elif name in COPIES and any(type(x) is Tensor and x.ndim for x in leaves):
            self.counts.copy(blocking=not _non_blocking(func, args, kwargs))
        if device is not None:
            args = change(lambda x: CPU if isinstance(x, torch.device) else x, args)
            kwargs = change(lambda x: CPU if isinstance(x, torch.device) else x, kwargs)
        result = self.counts.run(func, args, kwargs)
        if to_cpu:
            return result
        same = {id(x.values): x for x in there}  # operators in place return their operand
        return change(lambda x: same[id(x)] if id(x) in same else on_device(x), result)

    def _check(self, func: Any, name: str, args: Any, kwargs: Any, leaves: list[Any]) -> None:
        if func._schema.name.startswith(CPU_ONLY):
            raise RuntimeError(f"{func._schema.name} has no kernel for CUDA ({_line()})")
        if name in PRODUCTS and not args[0].is_floating_point():
            raise RuntimeError(f"{name}: CUDA multiplies no {args[0].dtype} ({_line()})")
        if name in INDEXING and isinstance(args[0], PretendedTensor):
            self._count_index(name, args)
        elif name not in COPIES:
            _refuse_mixed(name, leaves, _takes_scalars(func))
        self.counts_of(name, kwargs)

    def counts_of(self, name: str, kwargs: Any) -> None:
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.counts.wait()
        elif name in WAITS:
            self.counts.wait(WAITS[name])

    def _count_index(self, name: str, args: Any) -> None:
        """A mask becomes numbers, for which the host waits; it need not to assign one scalar."""
        indices = [i for i in args[1] if i is not None]
        masks = [i for i in indices if i.dtype in (torch.bool, torch.uint8)]
        value = args[2] if len(args) > 2 else None
        if not (len(indices) == len(masks) == 1 and type(value) is Tensor and not value.ndim):
            for _ in masks:
                self.counts.wait()
        for _ in (i for i in indices if not isinstance(i, PretendedTensor)):
            self.counts.copy(blocking=True)
        if isinstance(value, Tensor):
            _refuse_mixed(name, [args[0], value], scalars=True)


def _non_blocking(func: Any, args: Any, kwargs: Any) -> bool:
    """The argument of that name of copy_ or _to_copy."""
    names = [argument.name for argument in func._schema.arguments]
    at = names.index("non_blocking")
    return bool(args[at] if at < len(args) else kwargs.get("non_blocking", False))


def _refuse_mixed(name: str, leaves: list[Any], scalars: bool = False) -> None:
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    here = [x for x in tensors if not isinstance(x, PretendedTensor)]
    wrong = [tuple(x.shape) for x in here if x.ndim or not scalars]
    if wrong and len(here) < len(tensors):
        raise RuntimeError(f"{name}: {wrong} on the CPU, the others on CUDA ({_line()})")


@contextmanager
def pretended_cuda() -> Iterator[Counts]:
    """Where cuda:0 exists: `with pretended_cuda() as counts: load(folder, device="cuda")`."""
    counts = Counts()
    if not hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
        pytest.skip("this torch cannot have a device type without a device; a newer one can")
    torch._C._ensureCUDADeviceGuardSet()
    with ExitStack() as stack:
        for name, value in (
            ("cuda.device_count", lambda: 1),
            ("cuda._lazy_init", lambda: None),
            ("cuda.synchronize", lambda *_: counts.wait()),
            ("cuda.reset_peak_memory_stats", lambda *_: None),
            ("cuda.max_memory_allocated", lambda *_: 0),
            ("cuda.device", lambda _: nullcontext()),
            ("cuda.CUDAGraph", PretendedGraph),
            ("cuda.graph", counts.record),
            ("Generator", PretendedGenerator),
        ):
            stack.enter_context(mock.patch(f"torch.{name}", value))
        # Module.to() then exchanges parameters; else it would give them data without `values`
        swaps = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swaps)
        stack.enter_context(_Functions(counts))
        stack.enter_context(_Operators(counts))
        yield counts
