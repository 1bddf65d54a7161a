"""Which layers a text names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardfold.guard.base.errors import InputError
from guardfold.guard.presets.layers import parse_layers


@pytest.mark.parametrize(
    ("text", "count", "layers"),
    [
        ("last-quarter", 32, list(range(24, 32))),
        ("last-quarter", 3, [2]),
        ("last-half", 4, [2, 3]),
        ("all", 3, [0, 1, 2]),
        ("all", 1, [0]),
        ("3, 5,20-22", 32, [3, 5, 20, 21, 22]),
        ("4,2-5,2", 8, [2, 3, 4, 5]),
        ("0", 1, [0]),
    ],
)
def test_layers_are_named_by_share_or_number(text: str, count: int, layers: list[int]) -> None:
    assert parse_layers(text, count) == layers


@given(st.sets(st.integers(0, 39), min_size=1))
def test_numbers_are_read_back(layers: set[int]) -> None:
    assert parse_layers(",".join(map(str, layers)), 40) == sorted(layers)


@pytest.mark.parametrize("text", ["", "first", "1,", "-1", "1-", "1.5", "1;2", "a-b", "999999"])
def test_what_names_no_layers_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--layers"):
        parse_layers(text, 1000)


@pytest.mark.parametrize("text", ["32", "30-32", "5-3", "0-99999"])
def test_layers_out_of_range_are_refused_naming_the_range(text: str) -> None:
    with pytest.raises(InputError, match="out of range; layers are 0 to 31"):
        parse_layers(text, 32)
