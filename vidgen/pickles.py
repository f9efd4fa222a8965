"""Pickles of NumPy arrays, read without being run.

A pickle is a program: `pickle.load` runs it, and it may call anything. This reader walks the program's opcodes instead
(`pickletools`), knows the few that plain containers and numeric arrays are made of, and refuses all others by name.
It imports nothing and calls nothing that a file names.
"""

from __future__ import annotations

import enum
import math
import pickletools
from typing import Any

import numpy as np

from vidgen.config import ConfigError


class _Name(enum.Enum):
    """What a file may name. A stand-in: the thing itself is never looked up."""

    RECONSTRUCT = "_reconstruct"
    NDARRAY = "ndarray"
    DTYPE = "dtype"


_NAMES = {
    ("numpy.core.multiarray", "_reconstruct"): _Name.RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _Name.RECONSTRUCT,
    ("numpy", "ndarray"): _Name.NDARRAY,
    ("numpy", "dtype"): _Name.DTYPE,
}
_VALUES = set(
    "BINBYTES BINBYTES8 SHORT_BINBYTES BINUNICODE BINUNICODE8 SHORT_BINUNICODE "
    "BINFLOAT BININT BININT1 BININT2 LONG1".split()
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_MARK = object()


class _Array:
    """An array of which the contents have not been read yet."""


def load(path: str) -> Any:
    """Dicts, lists, tuples, numbers, text and NumPy arrays of numbers from a pickle.

    Raises ConfigError, naming the place, for a file that is cut, or holds or calls anything else.
    """
    try:
        with open(path, "rb") as f:
            data = f.read()
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror or e}; expected a pickle of NumPy arrays") from None
    at = 0
    machine = _Machine()
    try:
        for opcode, argument, at in pickletools.genops(data):  # noqa: B007  for the message
            if opcode.name == "STOP":
                return machine.result()
            machine.step(opcode.name, argument)
    except _Refused as e:
        raise ConfigError(f"{path}: byte {at}: {e}; expected NumPy arrays and plain containers only") from None
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError) as e:
        raise ConfigError(f"{path}: byte {at}: not a whole pickle ({e})") from None
    raise ConfigError(f"{path}: not a whole pickle")


class _Refused(ValueError):
    pass


class _Machine:
    """The pickle machine's stack and memo, for the opcodes that are known."""

    def __init__(self):
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"EMPTY_DICT": {}, "EMPTY_LIST": [], "EMPTY_TUPLE": ()}[name])
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(self.top(count))]
        elif name == "TUPLE":
            stack.append(tuple(self.since_mark()))
        elif name in ("SETITEM", "SETITEMS"):
            items = self.since_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            self.container(dict).update(zip(items[::2], items[1::2], strict=True))
        elif name in ("APPEND", "APPENDS"):
            items = self.since_mark() if name == "APPENDS" else [stack.pop()]
            self.container(list).extend(items)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            value = self.memo[argument]
            if isinstance(value, dict | list):  # nor can one be put into itself
                raise _Refused(f"a {type(value).__name__} that stands in two places")
            stack.append(value)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            if name == "GLOBAL":
                module, _, attribute = argument.partition(" ")
            else:
                attribute, module = stack.pop(), stack.pop()
            if (module, attribute) not in _NAMES:
                raise _Refused(f"it names {module}.{attribute}")
            stack.append(_NAMES[module, attribute])
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_call(function, arguments))
        elif name == "BUILD":
            state, thing = stack.pop(), stack.pop()
            built = _build(thing, state)
            stack.append(built)
            self.memo = {key: built if value is thing else value for key, value in self.memo.items()}
        elif name not in ("PROTO", "FRAME"):
            raise _Refused(f"the opcode {name}")

    def top(self, count: int) -> list[Any]:
        values = self.stack[-count:]
        if len(values) < count or any(value is _MARK for value in values):
            raise _Refused("a stack that is too short")
        return values

    def since_mark(self) -> list[Any]:
        at = max(i for i, value in enumerate(self.stack) if value is _MARK)
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    def container(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise _Refused(f"items for what is no {kind.__name__}")
        return self.stack[-1]

    def result(self) -> Any:
        if len(self.stack) != 1 or isinstance(self.stack[0], _Array | _Name):
            raise _Refused("no single result")
        return self.stack[0]


def _call(function: Any, arguments: Any) -> Any:
    if function is _Name.RECONSTRUCT and arguments[:1] == (_Name.NDARRAY,):
        return _Array()
    if function is _Name.DTYPE and isinstance(arguments[0], str):
        dtype = np.dtype(arguments[0])
        if dtype.kind in "biufc":
            return dtype
        raise _Refused(f"an array of dtype {arguments[0]!r}")
    raise _Refused("a call of something else than NumPy's array and dtype")


def _build(thing: Any, state: Any) -> Any:
    if isinstance(thing, np.dtype):  # (version, byte order, then what only structured dtypes have)
        if state[1] not in ("<", ">", "=", "|") or any(state[2:5]):
            raise _Refused("a structured dtype")
        return thing.newbyteorder(state[1])
    if not isinstance(thing, _Array):
        raise _Refused("the state of something else than an array or a dtype")
    _, shape, dtype, fortran, data = state
    if not isinstance(dtype, np.dtype) or not isinstance(data, bytes):
        raise _Refused("an array without its numbers")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(data):
        raise _Refused(f"{len(data)} bytes for an array {shape} of {dtype}")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
