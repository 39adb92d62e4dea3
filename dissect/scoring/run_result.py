"""What the results of all experiments have in common."""

import copy
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Copied(Generic[T]):
    """A dataclass field that hands out a copy, so that editing what it returns changes no later number.

    The object itself is kept under the field's name with a leading underscore, for code that only reads it.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        """Choose the attribute that keeps the object."""
        self._kept = f"_{name}"

    def __get__(self, instance: object | None, owner: type) -> T:
        """Return a deep copy of the object.

        Raises:
            AttributeError: The class is asked instead of an instance; dataclasses take this for "no default".
        """
        if instance is None:
            raise AttributeError(self._kept)
        kept: Any = getattr(instance, self._kept)
        return copy.deepcopy(kept)

    def __set__(self, instance: object, value: T) -> None:
        """Keep the object."""
        setattr(instance, self._kept, value)
