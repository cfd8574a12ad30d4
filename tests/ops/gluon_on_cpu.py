"""Run kernels in Gluon on the CPU: Triton's interpreter knows none of Gluon, so this stands in for it in tests.

    kernels = emulated(importlib.import_module("fastplug.ops.fp8.hopper"), late=True)
    kernels["launch"](...)

The module's functions run as plain Python, over stand-ins for the few parts of Gluon that they use: shared memory,
barriers, the copy engine, the tensor cores, warp specialization. What is asynchronous on a GPU happens either at once
(``late=False``) or as late as the program allows (``late=True``): loads when their barrier is waited for, stores and
products at the wait for them. Between the two, memory that is in flight holds NaN. So a missing wait, a buffer that is
filled while it is still read, a wrong phase or number of bytes fails here, in one of the two. Layouts, registers and
the visibility of writes between threads are not modelled: what the compiler makes of them is for a GPU to show.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FunctionType, SimpleNamespace
from typing import Any

import torch

TIMEOUT = 60.0  # seconds after which a barrier that nobody completes is called a deadlock


@dataclass
class Machine:
    """What one program has: which it is, and what is in flight."""

    late: bool
    program: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)
    products: dict[int, list[Pending]] = field(default_factory=dict)  # by thread
    stores: dict[int, list[Callable[[], None]]] = field(default_factory=dict)


class Buffer:
    """A block of shared memory, or several of them."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values
        self.dtype = values.dtype

    def index(self, i: Any) -> Any:
        part = self.values[int(i)]
        return part if isinstance(part, Barrier) else Buffer(part)

    def permute(self, order: tuple[int, ...]) -> Buffer:
        return Buffer(self.values.permute(order))

    def load(self, layout: Any) -> Tensor:
        return Tensor(self.values.clone())

    def store(self, value: Tensor) -> None:
        assert value.values.dtype == self.dtype, (value.values.dtype, self.dtype)
        assert value.values.shape == self.values.shape
        self.values.copy_(value.values)

    def reinterpret(self, dtype: torch.dtype, shape: Any, layout: Any) -> Buffer:
        flat = self.values.reshape(-1).view(torch.uint8)
        count = 1
        for size in shape:
            count *= int(size)
        return Buffer(flat[: count * dtype.itemsize].view(dtype).view(*map(int, shape)))

    _reinterpret = reinterpret


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes that were announced have come."""

    def __init__(self) -> None:
        self.count = self.missing = self.bytes = 0
        self.phases = 0  # that have ended
        self.loads: list[tuple[Callable[[], None], int]] = []

    def settle(self) -> None:
        while self.missing == 0 and self.bytes == 0 and self.count:
            self.phases += 1
            self.missing = self.count


class Tensor:
    """A tensor in registers."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values
        self.dtype, self.shape = values.dtype, values.shape

    def to(self, dtype: torch.dtype) -> Tensor:
        return Tensor(self.values.to(dtype))

    def reshape(self, shape: Any) -> Tensor:
        return Tensor(self.values.reshape(*shape))

    def permute(self, order: Any) -> Tensor:
        return Tensor(self.values.permute(*order))

    def split(self) -> tuple[Tensor, Tensor]:
        first, second = self.values.unbind(-1)
        return Tensor(first), Tensor(second)


def _operator(name: str) -> None:
    def apply(self: Tensor, other: Any) -> Any:
        return Tensor(getattr(self.values, name)(other.values if isinstance(other, Tensor) else other))

    setattr(Tensor, name, apply)


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "lt", "and"):
    _operator(f"__{_name}__")


class Pointer:
    """An address in global memory, or many."""

    def __init__(self, memory: torch.Tensor, offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.offset + (other.values if isinstance(other, Tensor) else int(other)))


@dataclass
class Pending:
    """A product that the tensor cores work on."""

    run: Callable[[], torch.Tensor]
    value: torch.Tensor | None = None

    def finish(self) -> torch.Tensor:
        if self.value is None:
            self.value = self.run()
        return self.value


class Descriptor:
    """A matrix as the copy engine sees it; beyond its ends are zeros, and nothing is written there."""

    def __init__(self, tensor: torch.Tensor, shape: Any, strides: Any, block: Any, layout: Any) -> None:
        assert tensor.data_ptr() % 16 == 0
        assert all(stride * tensor.itemsize % 16 == 0 for stride in strides[:-1])
        assert strides[-1] == 1
        assert block[-1] * tensor.itemsize >= 16
        self.tensor, self.block, self.layout, self.dtype = tensor, tuple(map(int, block)), layout, tensor.dtype

    def inside(self, corner: Any) -> tuple[torch.Tensor, tuple[slice, slice]]:
        row, column = map(int, corner)
        part = self.tensor[row : row + self.block[0], column : column + self.block[1]]
        return part, (slice(0, part.shape[0]), slice(0, part.shape[1]))


class Gluon:
    """The stand-ins for one machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    # --- barriers and the copy engine

    def expect(self, barrier: Barrier, count: int, pred: Any = True) -> None:
        if not pred:
            return
        with self.machine.changed:
            barrier.bytes += int(count)
            barrier.missing -= 1
            assert barrier.missing >= 0
            barrier.settle()
            self.machine.changed.notify_all()

    def arrive(self, barrier: Barrier, count: int = 1, pred: Any = True) -> None:
        if not pred:
            return
        with self.machine.changed:
            barrier.missing -= count
            assert barrier.missing >= 0
            barrier.settle()
            self.machine.changed.notify_all()

    def init(self, barrier: Barrier, count: int) -> None:
        barrier.count = barrier.missing = count

    def wait(self, barrier: Barrier, phase: Any) -> None:
        """Until the phase of that parity has ended; that of the other parity had before."""
        with self.machine.changed:
            for load, size in barrier.loads:
                load()
                barrier.bytes -= size
            barrier.loads.clear()
            barrier.settle()
            self.machine.changed.notify_all()

            def over() -> bool:
                if barrier.loads:  # came while this thread waited
                    for load, size in barrier.loads:
                        load()
                        barrier.bytes -= size
                    barrier.loads.clear()
                    barrier.settle()
                return (barrier.phases - 1) % 2 == int(phase) % 2

            assert self.machine.changed.wait_for(over, TIMEOUT), "nobody completes this phase of the barrier"

    def async_load(self, source: Descriptor, corner: Any, barrier: Barrier, target: Buffer, pred: Any = True) -> None:
        if not pred:
            return
        part, inside = source.inside(corner)
        assert target.values.shape == source.block
        size = target.values.numel() * target.values.itemsize

        def load() -> None:
            target.values.zero_()
            target.values[inside].copy_(part)

        with self.machine.changed:
            if self.machine.late:
                target.values.fill_(float("nan"))
                barrier.loads.append((load, size))
            else:
                load()
                barrier.bytes -= size
                barrier.settle()
            self.machine.changed.notify_all()

    def async_store(self, target: Descriptor, corner: Any, source: Buffer) -> None:
        part, inside = target.inside(corner)
        assert source.values.shape == target.block
        self.machine.stores.setdefault(threading.get_ident(), []).append(lambda: part.copy_(source.values[inside]))
        if not self.machine.late:
            self.machine.stores[threading.get_ident()][-1]()

    def store_wait(self, pendings: int) -> None:
        mine = self.machine.stores.setdefault(threading.get_ident(), [])
        while len(mine) > pendings:
            store = mine.pop(0)
            if self.machine.late:
                store()

    # --- the tensor cores

    def warpgroup_mma(self, a: Any, b: Any, acc: Any, use_acc: bool = True, is_async: bool = False) -> Any:
        def run() -> torch.Tensor:
            before = acc.finish() if isinstance(acc, Pending) else acc.values
            product = a.values.float() @ b.values.float()
            return product + before if use_acc else product

        assert a.values.shape[0] == 64 * max(1, a.values.shape[0] // 64)
        assert a.values.shape[1] == b.values.shape[0]
        pending = Pending(run)
        self.machine.products.setdefault(threading.get_ident(), []).append(pending)
        if not self.machine.late or not is_async:
            pending.finish()
        return pending if is_async else Tensor(pending.finish())

    def warpgroup_mma_wait(self, outstanding: int, deps: Any) -> Any:
        mine = self.machine.products.setdefault(threading.get_ident(), [])
        while len(mine) > outstanding:
            mine.pop(0).finish()
        done = tuple(
            dep
            if isinstance(dep, Pending) and dep in mine
            else Tensor(dep.finish())
            if isinstance(dep, Pending)
            else dep
            for dep in deps
        )
        return done[0] if len(done) == 1 else done

    def warp_specialize(self, functions: Any, warps: Any, registers: Any) -> None:
        errors: list[BaseException] = []

        def run(function: Any, arguments: Any) -> None:
            try:
                function(*arguments)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in functions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT * 2)
        if errors:
            raise errors[0]

    # --- the language

    def allocate_shared_memory(self, dtype: Any, shape: Any, layout: Any) -> Any:
        if dtype is torch.int64:  # barriers
            barriers = [Barrier() for _ in range(int(shape[0]))]
            return barriers[0] if len(shape) == 1 else Barriers(barriers)
        return Buffer(torch.full(tuple(map(int, shape)), float("nan"), dtype=torch.float32).to(dtype))

    def store(self, pointer: Pointer, value: Tensor, mask: Tensor) -> None:
        offsets, where = torch.broadcast_tensors(pointer.offset, mask.values)
        pointer.memory.view(-1)[offsets[where]] = value.values[where].to(pointer.memory.dtype)

    def load(self, pointer: Pointer, mask: Tensor, other: float) -> Tensor:
        found = torch.full(pointer.offset.shape, other, dtype=pointer.memory.dtype)
        found[mask.values] = pointer.memory.view(-1)[pointer.offset[mask.values]]
        return Tensor(found)

    def approximate(self, assembly: str, constraints: str, arguments: Any, dtype: Any, is_pure: bool, pack: int) -> Any:
        assert assembly == "rcp.approx.ftz.f32 $0, $1;"
        return Tensor(1 / arguments[0].values)

    def language(self) -> SimpleNamespace:
        def unary(function: Any) -> Any:
            return lambda x: Tensor(function(x.values))

        def binary(function: Any) -> Any:
            def apply(x: Any, y: Any) -> Any:
                if not isinstance(x, Tensor) and not isinstance(y, Tensor):
                    return min(x, y) if function is torch.minimum else max(x, y)
                x, y = (t.values if isinstance(t, Tensor) else torch.tensor(t) for t in (x, y))
                return Tensor(function(x, y))

            return apply

        layouts = SimpleNamespace(get_default_for=lambda block, dtype: None)
        return SimpleNamespace(
            allocate_shared_memory=self.allocate_shared_memory,
            arange=lambda start, end, layout: Tensor(torch.arange(start, int(end))),
            bfloat16=torch.bfloat16, float16=torch.float16, float32=torch.float32, int32=torch.int32,
            int64=torch.int64, float8e4nv=torch.float8_e4m3fn, constexpr=lambda value: value,
            cdiv=lambda a, b: -(-a // b), convert_layout=lambda x, layout: x,
            exp2=unary(torch.exp2), expand_dims=lambda x, axis: Tensor(x.values.unsqueeze(axis)),
            inline_asm_elementwise=self.approximate, load=self.load, store=self.store,
            maximum=binary(torch.maximum), minimum=binary(torch.minimum), num_warps=lambda: 8,
            program_id=lambda axis: torch.tensor(self.machine.program), static_range=range,
            warp_specialize=self.warp_specialize,
            zeros=lambda shape, dtype, layout: Tensor(torch.zeros(tuple(map(int, shape)), dtype=dtype)),
            BlockedLayout=lambda *a: None, NVMMADistributedLayout=lambda *a: None, NVMMASharedLayout=layouts,
            SliceLayout=lambda *a: None,
        )  # fmt: skip


class Barriers:
    def __init__(self, barriers: list[Barrier]) -> None:
        self.barriers = barriers

    def index(self, i: Any) -> Barrier:
        return self.barriers[int(i)]


class Kernel:
    """``kernel[grid](...)``: one program after another."""

    def __init__(self, function: Callable[..., None], machine: Machine) -> None:
        self.function, self.machine = function, machine

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            pointers = [Pointer(x) if isinstance(x, torch.Tensor) else x for x in arguments]
            for program in range(grid[0]):
                self.machine.program = program
                self.machine.products.clear()
                self.machine.stores.clear()
                self.function(*pointers)
                assert not any(self.machine.stores.values()), "a program ended before its stores had"

        return launch

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)


def emulated(module: Any, late: bool) -> dict[str, Any]:
    """The names of a module of Gluon kernels and their launchers, to be run on CPU tensors."""
    machine = Machine(late)
    fake = Gluon(machine)
    names = dict(vars(module))
    names |= {
        "gl": fake.language(),
        "tma": SimpleNamespace(store_wait=fake.store_wait),
        "mbarrier": SimpleNamespace(
            init=fake.init, expect=fake.expect, wait=fake.wait, arrive=fake.arrive, MBarrierLayout=lambda: None
        ),
        "async_load": fake.async_load,
        "async_store": fake.async_store,
        "barrier": lambda: None,
        "fence_async_shared": lambda: None,
        "warpgroup_mma": fake.warpgroup_mma,
        "warpgroup_mma_wait": fake.warpgroup_mma_wait,
        "TensorDescriptor": Descriptor,
    }
    for name, value in _functions(module, names):
        function = FunctionType(value.__code__, names, name, value.__defaults__)
        kernel = name.endswith("_kernel")
        names[name] = Kernel(function, machine) if kernel else function
    return names


def _functions(module: Any, names: dict[str, Any]) -> Iterator[tuple[str, FunctionType]]:
    """Its functions, also those under ``gluon.jit``, and what it takes from other modules of kernels; adds to ``names``
    what those refer to."""
    for name, value in list(vars(module).items()):
        function = getattr(value, "fn", value)
        if not isinstance(function, FunctionType):
            continue
        if function.__module__ == module.__name__:
            yield name, function
        elif function.__module__.startswith("fastplug.") and "gl" in function.__globals__:
            for other, found in function.__globals__.items():
                names.setdefault(other, found)
            yield from _functions(sys.modules[function.__module__], names)
