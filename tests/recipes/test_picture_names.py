"""What the pictures that answer requests are called."""

from typing import Any

import pytest

from synthos.recipes.base import count_pictures, name_pictures

ONE: dict[str, Any] = {"name": "barn"}
SET: dict[str, Any] = {"name": "cat", "pictures": ["compose", "component_0"]}


def test_one_picture_is_called_as_its_request_and_several_after_it() -> None:
    assert name_pictures([ONE, SET]) == [["barn"], ["cat_compose", "cat_component_0"]]
    assert count_pictures([ONE, SET]) == [1, 2]


def test_an_only_request_need_not_be_named() -> None:
    assert name_pictures([SET], alone=True) == [["compose", "component_0"]]
    assert name_pictures([ONE], alone=True) == [["barn"]]
    assert name_pictures([ONE, SET], alone=True) == name_pictures([ONE, SET])


def test_two_pictures_of_one_name() -> None:
    with pytest.raises(ValueError, match="requests: two pictures would be called 'cat_compose'; expected other names"):
        name_pictures([SET, {"name": "cat_compose"}])
    with pytest.raises(ValueError, match="would be called 'scale_6'"):
        name_pictures([{"name": "a", "pictures": ["scale_6", "scale_6"]}], alone=True)
