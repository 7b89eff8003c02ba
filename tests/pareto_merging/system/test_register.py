"""Tables take a member under a name of its own, whoever it comes from."""

import pytest

from pareto_merging.system.register import add_member


@pytest.mark.parametrize("reserved", [(), ("auto", "all")])
def test_a_free_name(reserved: tuple[str, ...]) -> None:
    table = {"a": 1}
    assert add_member(table, "thing", "b", 2, reserved=reserved) == 2
    assert table == {"a": 1, "b": 2}
    assert add_member(table, "thing", "a", 3, replace=True) == 3
    assert list(table.items()) == [("a", 3), ("b", 2)]


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("name", ["", None, 7, "auto"])
def test_what_is_no_free_name(name: object, replace: bool) -> None:
    table: dict[str, int] = {}
    with pytest.raises(ValueError, match=f"thing: expected a (new )?name, got {name!r}"):
        add_member(table, "thing", name, 1, reserved=["auto"], replace=replace)  # type: ignore[misc]
    assert not table


def test_a_name_that_is_taken() -> None:
    table = {"a": 1}
    with pytest.raises(ValueError, match="thing: expected a new name, got 'a', which is taken"):
        add_member(table, "thing", "a", 2)
    layers = {int: 1}
    with pytest.raises(ValueError, match="layer: expected a new class, got <class 'int'>, which is taken"):
        add_member(layers, "layer", int, 2)
    assert table == {"a": 1} and layers == {int: 1}
