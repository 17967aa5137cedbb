"""`dataclass` as everywhere in hvctl: the standard library's, but frozen ones are made without compiling code for them.

`dataclasses.dataclass` writes out and compiles six methods for each frozen class whenever its module is imported, 0.8 ms
each with Python 3.11: for the 40 classes that `create` needs, 27 of 200 ms of importing. Here all classes share the
same six methods, which look fields up instead: making a value takes longer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import MISSING, FrozenInstanceError
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass  # the same for whoever checks types
else:

    def dataclass(cls: type | None = None, *, frozen: bool = False, **options: bool) -> type | Callable[[type], type]:
        """Like `dataclasses.dataclass`, whose `replace`, `fields` and `asdict` work on its classes.

        A frozen class (without slots) cannot have `__post_init__`, `InitVar`, `ClassVar`, fields that are left out of
        `__init__` or of comparison, or a frozen class that it inherits from.
        """

        def make(made: type) -> type:
            if not frozen or "slots" in options:
                return dataclasses.dataclass(frozen=frozen, **options)(made)
            dataclasses.dataclass(init=False, repr=False, eq=False, **options)(made)
            for name, method in _METHODS.items():
                if name not in made.__dict__:
                    setattr(made, name, method)
            return made

        return make if cls is None else make(cls)


def _init(self: Any, *positional: Any, **named: Any) -> None:
    fields = type(self).__dataclass_fields__
    if positional:
        order = type(self).__match_args__  # those that are not keyword-only
        if len(positional) > len(order):
            raise TypeError(f"{type(self).__name__} takes {len(order)} positional arguments, not {len(positional)}")
        for name, value in zip(order, positional, strict=False):
            if name in named:
                raise TypeError(f"{type(self).__name__} got two values for {name!r}")
            named[name] = value
    values = self.__dict__
    for name, field in fields.items():
        if name in named:
            values[name] = named.pop(name)
        elif field.default is not MISSING:
            values[name] = field.default
        elif field.default_factory is not MISSING:
            values[name] = field.default_factory()
        else:
            raise TypeError(f"{type(self).__name__} lacks a value for {name!r}")
    if named:
        raise TypeError(f"{type(self).__name__} has no field {next(iter(named))!r}")


def _repr(self: Any) -> str:
    shown = [field.name for field in dataclasses.fields(self) if field.repr]
    return f"{type(self).__qualname__}({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"


def _eq(self: Any, other: object) -> bool:
    return self.__dict__ == other.__dict__ if type(other) is type(self) else NotImplemented


def _hash(self: Any) -> int:
    return hash(tuple(self.__dict__.values()))


def _refuse(self: Any, name: str, _value: object = None) -> NoReturn:
    raise FrozenInstanceError(f"cannot change field {name!r} of {type(self).__name__}")


_METHODS = {
    "__init__": _init,
    "__repr__": _repr,
    "__eq__": _eq,
    "__hash__": _hash,
    "__setattr__": _refuse,
    "__delattr__": _refuse,
}
