"""Reads a pickle by its opcodes into plain values and inert records: nothing is imported and nothing is called."""

import pickletools
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from pickle import UnpicklingError
from typing import Any

MAX_OPCODES = 1 << 20
"""More are refused, since each one can make an object of some 100 bytes; a file of CIFAR-100 has 200,000."""
_MAX_TUPLES = 64  # nested in one another; Python hashes them by a recursion that nothing bounds
_ATOMS = (str, bytes, int, float, bool, type(None))
_VALUES = frozenset(
    ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING",
     "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8")
)  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True, eq=False)
class Name:
    """A class or a function that a pickle names; it is not looked up."""

    path: str  # with the module's


@dataclass(eq=False)
class Call:
    """A call that a pickle asks for; it is not made.

    Attributes:
        function: What to call; "" for the loading of an object from outside the pickle.
        arguments: Its arguments.
        state: The state to set in the result, or None.
    """

    function: str
    arguments: tuple[Any, ...]
    state: Any = None


@dataclass
class PlainReader:
    """The stack machine of pickles, for the opcodes of plain values, names and calls.

    Attributes:
        admitted: Names that may occur; None admits all.
        max_opcodes: How many opcodes a pickle may have.
        calls: All calls that the pickle asks for.
    """

    admitted: Container[str] | None = ()
    max_opcodes: int = MAX_OPCODES
    calls: list[Call] = field(default_factory=list)
    _stack: list[Any] = field(default_factory=list)
    _marked: list[list[Any]] = field(default_factory=list)  # the stacks below the marks
    _memo: dict[int, Any] = field(default_factory=dict)
    _depths: dict[int, int] = field(default_factory=dict)  # of tuples, by their ids

    def read(self, data: bytes) -> Any:
        """The value of a pickle, in which each call is a :class:`Call`; byte strings of Python 2 are latin-1 text.

        Raises:
            UnpicklingError: It asks for something that is not admitted, or has too many opcodes.
            Exception: It is damaged; which one depends on where.
        """
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if count >= self.max_opcodes:
                raise UnpicklingError(f"more than {self.max_opcodes} opcodes")
            if opcode.name == "STOP":
                return self._stack.pop()
            if opcode.name in _VALUES:
                self._stack.append(argument)
            elif opcode.name in _CONSTANTS:
                self._stack.append(_CONSTANTS[opcode.name])
            elif opcode.name not in ("PROTO", "FRAME"):
                self._do(opcode.name, argument)
        raise UnpicklingError("no end")

    def _do(self, name: str, argument: Any) -> None:
        """Follows an opcode that is not just a value."""
        action = _ACTIONS.get(name)
        if action is not None:
            action(self, argument)
        elif name in _TUPLES:
            self._append_tuple([self._stack.pop() for _ in range(_TUPLES[name])][::-1])
        else:
            raise UnpicklingError(f"the opcode {name} is not admitted")

    def _pop_to_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marked.pop()
        return items

    def _mark(self, _: None) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def _append_tuple(self, items: list[Any]) -> None:
        made = tuple(items)
        depth = 1 + max((self._depths.get(id(item), 0) for item in items if type(item) is tuple), default=0)
        if depth > _MAX_TUPLES:
            raise UnpicklingError(f"more than {_MAX_TUPLES} nested tuples")
        self._depths[id(made)] = depth
        self._stack.append(made)

    def _remember(self, index: int | None) -> None:
        self._memo[len(self._memo) if index is None else index] = self._stack[-1]

    def _recall(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def _extend(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise UnpicklingError("a list was expected")
        self._stack[-1].extend(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is Call:
            return  # a subclass of dict, which is not made
        if type(target) is not dict or len(items) % 2:
            raise UnpicklingError("a dict was expected")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (*_ATOMS, tuple, Name, Call)):
                raise UnpicklingError(f"a key of a dict is a {type(key).__name__}")
            target[key] = value

    def _append_name(self, path: str) -> None:
        if self.admitted is not None and path not in self.admitted:
            raise UnpicklingError(f"{path} is not admitted in a data file")
        self._stack.append(Name(path))

    def _name_from_stack(self, _: None) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if type(name) is not str or type(module) is not str:
            raise UnpicklingError("a name was expected")
        self._append_name(f"{module}.{name}")

    def _call(self, _: None) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if type(function) is not Name or type(arguments) is not tuple:
            raise UnpicklingError("a call was expected")
        self._append_call(Call(function.path, arguments))

    def _append_call(self, call: Call) -> None:
        self.calls.append(call)
        self._stack.append(call)

    def _set_state(self, _: None) -> None:
        state = self._stack.pop()
        if type(self._stack[-1]) is not Call:
            raise UnpicklingError("an object was expected")
        self._stack[-1].state = state


_ACTIONS: dict[str, Callable[[PlainReader, Any], None]] = {
    "MARK": PlainReader._mark,
    "EMPTY_LIST": lambda reader, _: reader._stack.append([]),
    "EMPTY_DICT": lambda reader, _: reader._stack.append({}),
    "TUPLE": lambda reader, _: reader._append_tuple(reader._pop_to_mark()),
    "APPEND": lambda reader, _: reader._extend([reader._stack.pop()]),
    "APPENDS": lambda reader, _: reader._extend(reader._pop_to_mark()),
    "SETITEM": lambda reader, _: reader._set_items([reader._stack.pop(), reader._stack.pop()][::-1]),
    "SETITEMS": lambda reader, _: reader._set_items(reader._pop_to_mark()),
    "BINPUT": PlainReader._remember,
    "LONG_BINPUT": PlainReader._remember,
    "MEMOIZE": PlainReader._remember,
    "BINGET": PlainReader._recall,
    "LONG_BINGET": PlainReader._recall,
    "GLOBAL": lambda reader, path: reader._append_name(path.replace(" ", ".", 1)),
    "STACK_GLOBAL": PlainReader._name_from_stack,
    "REDUCE": PlainReader._call,
    "NEWOBJ": PlainReader._call,
    "BUILD": PlainReader._set_state,
    "BINPERSID": lambda reader, _: reader._append_call(Call("", (reader._stack.pop(),))),
}
