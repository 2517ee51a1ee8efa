# SPDX-License-Identifier: Apache-2.0
"""How an argument of the pipeline is declared: its values, its meaning, and what else is made from the declaration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import ClassVar, TypeVar

from .inputs import LARGEST_COUNT, check_choice, check_integer, check_number, check_text

ASK_PYTHON = object()  # the option of an argument that the command line does not have


@dataclass(frozen=True)
class Values:
    """Which values an argument takes. This class itself stands for values that only Python can hold."""

    in_files: ClassVar[bool] = False  # whether JSON, and so a manifest or a sidecar, can hold a value

    def check(self, name: str, value: object) -> None:
        """Raise TypeError or ValueError unless the value is allowed, whatever model it is for."""


@dataclass(frozen=True)
class WholeNumbers(Values):
    """Whole numbers from `least` to `largest`."""

    least: int
    largest: int = LARGEST_COUNT
    in_files: ClassVar[bool] = True

    def check(self, name: str, value: object) -> None:
        """Raise TypeError or ValueError unless the value is such a number."""
        check_integer(name, value, self.least, self.largest)


@dataclass(frozen=True)
class Numbers(Values):
    """Numbers from `least`, or above it where `inclusive` is false, to `largest`, far beyond what is of any use."""

    least: float
    inclusive: bool = True
    largest: float = 1000.0
    in_files: ClassVar[bool] = True

    def check(self, name: str, value: object) -> None:
        """Raise TypeError or ValueError unless the value is such a number."""
        check_number(name, value, self.least, self.inclusive, self.largest)


@dataclass(frozen=True)
class Switch(Values):
    """True or False."""

    in_files: ClassVar[bool] = True

    def check(self, name: str, value: object) -> None:
        """Raise TypeError unless the value is one of the two."""
        if not isinstance(value, bool):
            raise TypeError(f"`{name}` must be True or False, not {value!r} of type {type(value).__name__}")


@dataclass(frozen=True)
class Choice(Values):
    """One of several names."""

    names: tuple[str, ...]
    in_files: ClassVar[bool] = True

    def check(self, name: str, value: object) -> None:
        """Raise ValueError unless the value is one of the names."""
        check_choice(name, value, self.names)


@dataclass(frozen=True)
class Blocks(Values):
    """Indices of up blocks of the UNet; `check_blocks` knows how many there may be."""

    check_blocks: Callable[[object], None]
    least: int  # how many indices there must be
    in_files: ClassVar[bool] = True

    def check(self, name: str, value: object) -> None:
        """Raise TypeError or ValueError unless the value has the form of such indices."""
        self.check_blocks(value)


@dataclass(frozen=True)
class Text(Values):
    """A text. With `of_each_photo` it may also be two, one for each photo. A batch has a list of them."""

    of_each_photo: bool = False
    in_files: ClassVar[bool] = True

    def check(self, name: str, value: object) -> None:
        """Raise ValueError unless all texts are valid Unicode; `prompts.py` knows which forms are allowed."""
        check_text(name, value)


@dataclass(frozen=True)
class Plain(Values):
    """Values that JSON can hold and that are checked together with other arguments."""

    in_files: ClassVar[bool] = True


@dataclass(frozen=True)
class Function(Values):
    """A function, or any other object that can be called."""

    def check(self, name: str, value: object) -> None:
        """Raise TypeError unless the value can be called."""
        if not callable(value):
            raise TypeError(f"`{name}` must be a function, not {value!r} of type {type(value).__name__}")


@dataclass(frozen=True)
class Keywords(Values):
    """A dictionary of keyword arguments; one that is called "scale" is a number."""

    def check(self, name: str, value: object) -> None:
        """Raise TypeError or ValueError unless the value is such a dictionary."""
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise TypeError(f"`{name}` must be a dictionary with strings as keys, not {value!r}")
        if "scale" in value:
            check_number(f'{name}["scale"]', value["scale"], -1000, maximum=1000)


@dataclass(frozen=True)
class Names(Values):
    """A list or a tuple of names."""

    def check(self, name: str, value: object) -> None:
        """Raise TypeError unless the value is a sequence of strings, and not a single string."""
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
            raise TypeError(f"`{name}` must be a list of strings, not {value!r} of type {type(value).__name__}")


@dataclass(frozen=True)
class Levels(Values):
    """Two numbers in (0, 1], of which the second is not the smaller one."""

    in_files: ClassVar[bool] = True

    def check(self, name: str, value: object) -> None:
        """Raise TypeError or ValueError unless the value is allowed, whatever model it is for."""
        if not isinstance(value, (list, tuple)) or len(value) != 2:
            raise TypeError(f"`{name}` must be two numbers, from the smaller to the larger one, not {value!r}")
        for number in value:
            check_number(name, number, 0, inclusive=False, maximum=1)
        if value[0] > value[1]:
            raise ValueError(f"`{name}` must be two numbers, from the smaller to the larger one, not {value!r}")


@dataclass(frozen=True)
class Motion(Values):
    """Four numbers: a zoom above 0, an angle in degrees, and shares of the picture's sides."""

    in_files: ClassVar[bool] = True

    def check(self, name: str, value: object) -> None:
        """Raise TypeError or ValueError unless the value is such numbers."""
        if not isinstance(value, (list, tuple)) or len(value) != 4:
            raise TypeError(f"`{name}` must be four numbers, (zoom, degrees, right, down), not {value!r}")
        for number, least, inclusive, largest in zip(
            value, (0, -3600, -10, -10), (False, True, True, True), (100, 3600, 10, 10), strict=True
        ):
            check_number(name, number, least, inclusive, largest)


@dataclass(frozen=True)
class Pictures(Values):
    """A picture, or two, one for each photo."""


@dataclass(frozen=True)
class Poses(Values):
    """The poses of the people in both photos, or the paths of files that hold them."""


@dataclass(frozen=True)
class Ranking(Values):
    """Two texts, or a function."""

    in_files: ClassVar[bool] = True

    def check(self, name: str, value: object) -> None:
        """Raise TypeError unless the value is one of these."""
        if callable(value):
            return
        if not isinstance(value, (list, tuple)) or len(value) != 2 or not all(isinstance(text, str) for text in value):
            raise TypeError(f"`{name}` must be two texts or a function, not {value!r} of type {type(value).__name__}")
        check_text(name, value)


@dataclass(frozen=True)
class Choices(Values):
    """A dictionary from times to whole numbers of at least 0."""

    def check(self, name: str, value: object) -> None:
        """Raise TypeError or ValueError unless the value is such a dictionary."""
        if not isinstance(value, Mapping):
            raise TypeError(f"`{name}` must be a dictionary from δ to a number, not {value!r}")
        for time, index in value.items():
            check_number(f"{name}: δ", time, 0, maximum=1)
            check_integer(f"{name}[{time}]", index, 0)


LATENTS, PICTURES = "latents", "pictures"  # what of the frames an argument may decide


@dataclass(frozen=True)
class Argument:
    """The declaration of one argument.

    `paper` is the value that the paper has; `decides` is `LATENTS` or `PICTURES`, or None where the argument says how
    the frames are computed and not which; `option` is the command line's name, `ASK_PYTHON` where it has none;
    `slider` is the range that the web page offers, None where it offers none.
    """

    name: str
    annotation: str
    default: object
    values: Values
    about: str
    paper: object
    decides: str | None
    option: str | object
    slider: tuple[float, float] | None


def argument(
    default: object,
    values: Values,
    about: str,
    *,
    paper: object = None,
    decides: str | None = LATENTS,
    option: str | object | None = None,
    slider: tuple[float, float] | None = None,
):
    """Declare a field of a settings class as an argument of the pipeline.

    Args:
        default: The pipeline's default.
        values: The values that are allowed beside a default of None.
        about: What the argument means, in sentences that stand alone.
        paper: The paper's value where it is not the default.
        decides: `LATENTS` if the argument decides the frames' latents, `PICTURES` if only what is made of them, and
            None if neither.
        option: The name on the command line where it does not follow from the argument's, or `ASK_PYTHON`.
        slider: The range that the web page offers.
    """
    paper = default if paper is None else paper
    metadata = {"values": values, "about": about, "paper": paper, "decides": decides, "option": option}
    return field(default=default, metadata={**metadata, "slider": slider})


Group = TypeVar("Group", bound="Settings")


class Settings:
    """The base of the groups of arguments; making one checks every value that can be checked without a model."""

    def __post_init__(self):
        for declared in arguments_of(type(self)).values():
            value = getattr(self, declared.name)
            if value is not None or declared.default is not None:
                declared.values.check(declared.name, value)

    @classmethod
    def of(cls: type[Group], given: Mapping[str, object]) -> Group:
        """The group with those of the given values that are its own; the others have their defaults."""
        return cls(**taken(given, cls))


def arguments_of(*groups: type[Settings]) -> dict[str, Argument]:
    """The arguments that are declared in some groups, by name."""
    return {
        declared.name: Argument(
            name=declared.name,
            annotation=str(declared.type),
            default=declared.default,
            **{
                **declared.metadata,
                "option": declared.metadata["option"] or f"--{declared.name.replace('_', '-')}",
            },
        )
        for group in groups
        for declared in fields(group)
    }


def taken(given: Mapping[str, object], *groups: type[Settings]) -> dict[str, object]:
    """Those of the given values that belong to arguments of some groups."""
    names = arguments_of(*groups)
    return {name: value for name, value in given.items() if name in names}
