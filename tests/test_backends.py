"""What a mode cannot, it says; and the table of that is made of the same methods."""

from __future__ import annotations

import inspect

import pytest

from hvctl import backends
from hvctl.backends import get_backend
from hvctl.backends.base import Backend
from hvctl.errors import Unsupported
from hvctl.hostside import ids, machine
from hvctl.model import Mode

OPTIONAL = [method for method in vars(Backend).values() if getattr(method, "feature", "")]


def test_the_table_has_every_optional_ability_and_somebody_who_can() -> None:
    table = {item.name: item.modes for item in backends.features()}
    assert sorted(table) == sorted(method.feature for method in OPTIONAL)
    assert all(0 < len(modes) < len(Mode) for modes in table.values())


@pytest.mark.parametrize("method", OPTIONAL, ids=lambda method: method.__name__)
@pytest.mark.parametrize("mode", Mode)
def test_who_cannot_says_so_with_the_way_to_the_table(mode: Mode, method: object) -> None:
    backend, name = get_backend(mode), method.__name__  # type: ignore[attr-defined]
    can = next(item.modes for item in backends.features() if item.name == method.feature)  # type: ignore[attr-defined]
    if mode in can:
        assert getattr(type(backend), name) is not method
        return
    arguments = [None] * (len(inspect.signature(getattr(backend, name)).parameters))
    with pytest.raises(Unsupported) as refused:
        getattr(backend, name)(*arguments)
    assert backend.noun in refused.value.message
    assert "hvctl host features" in refused.value.hint


@pytest.mark.parametrize(("text", "chosen"), [("0", {0}), ("0-2", {0, 1, 2}), ("0-1,8", {0, 1, 8}), ("3,3", {3})])
def test_a_set_of_cpus_is_read_as_the_kernel_does(text: str, chosen: set[int]) -> None:
    assert machine.parse_cpuset(text) == chosen


@pytest.mark.parametrize("text", ["", "x", "-", "1-", "-1", "2-1", "0,", "0-99999", "٣", "0 1", "0-1-2"])
def test_what_is_no_set_of_cpus_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        machine.parse_cpuset(text)


def test_a_range_of_ids_is_the_lowest_that_touches_nobody() -> None:
    first = 0x70000000
    assert ids.find_free([]) == first
    assert ids.find_free([(first, ids.COUNT)]) == first + ids.COUNT
    assert ids.find_free([(first + 1, 1)]) == first + ids.COUNT
    assert ids.find_free([(first - 1, 2)]) == first + ids.COUNT  # it reaches one id into ours
    assert ids.find_free([(first - 10, 10)]) == first
    assert ids.find_free([(first + ids.COUNT, ids.COUNT)]) == first
    with pytest.raises(OSError, match="taken"):
        ids.find_free([(0, 2**32)])
