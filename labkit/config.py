"""Settings of a technique: frozen dataclasses that pydantic checks when they are made.

A `ValidationError` is a `ValueError`; it names the field, the rule, and the value that came.
Types are strict: no text where a number is wanted, no truth value where a count is.
"""

import os
from typing import Annotated, TypeVar, dataclass_transform

os.environ.setdefault("PYDANTIC_ERRORS_INCLUDE_URL", "0")  # a link in each message helps nobody

from pydantic import ConfigDict, Field, dataclasses  # noqa: E402

Count = Annotated[int, Field(ge=1)]  # a whole number from 1
Natural = Annotated[int, Field(ge=0)]  # a whole number from 0
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]  # from 0 to below 1
Probability = Annotated[float, Field(ge=0, le=1)]

_Class = TypeVar("_Class", bound=type)


@dataclass_transform(frozen_default=True)
def settings(cls: _Class) -> _Class:
    """Class decorator: a frozen dataclass with strict types and no unknown fields."""
    strict = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)
    return dataclasses.dataclass(frozen=True, config=strict)(cls)  # type: ignore[return-value]
