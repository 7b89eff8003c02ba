"""How a member comes into a table: under a name that is free."""

from collections.abc import Collection
from typing import TypeVar

Key = TypeVar("Key", bound="str | type")
Member = TypeVar("Member")


def add_member(
    table: dict[Key, Member],
    what: str,
    name: Key,
    member: Member,
    *,
    replace: bool = False,
    reserved: Collection[str] = (),
) -> Member:
    """Add a member to the table of ``what`` and return it. ``replace`` lets it take another's place.

    Raises:
        ValueError: no name, or one that is reserved or taken.
    """
    kind = "class" if isinstance(name, type) else "name"
    if not isinstance(name, str | type) or not name:
        raise ValueError(f"{what}: expected a {kind}, got {name!r}")
    if name in reserved or (name in table and not replace):
        raise ValueError(f"{what}: expected a new {kind}, got {name!r}, which is taken")
    table[name] = member
    return member
