"""Any value that a typed message may hold, as a hypothesis strategy made from its annotations."""

from enum import Enum
from types import UnionType
from typing import Any, NewType, Union, get_args, get_origin, get_type_hints

import msgspec
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

PLAIN: dict[Any, SearchStrategy[Any]] = {
    int: st.integers(-(2**63), 2**63 - 1),
    float: st.floats(allow_nan=False),
    str: st.text(max_size=8),
    bytes: st.binary(max_size=8),
    bool: st.booleans(),
    type(None): st.none(),
}


def values_of(kind: Any) -> SearchStrategy[Any]:
    if isinstance(kind, NewType):
        return values_of(kind.__supertype__)
    if get_origin(kind) in (Union, UnionType):
        return st.one_of([values_of(each) for each in get_args(kind)])
    if get_origin(kind) is tuple:
        return _tuples_of(get_args(kind))
    if get_origin(kind) is dict:
        key, value = get_args(kind)
        return st.dictionaries(values_of(key), values_of(value), max_size=2)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return st.sampled_from(kind)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return st.builds(kind, **{name: values_of(hint) for name, hint in get_type_hints(kind).items()})
    return PLAIN[kind]


def _tuples_of(kinds: tuple[Any, ...]) -> SearchStrategy[Any]:
    if kinds[-1] is Ellipsis:
        return st.lists(values_of(kinds[0]), max_size=2).map(tuple)
    return st.tuples(*(values_of(each) for each in kinds))
