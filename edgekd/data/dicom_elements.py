"""The values of a DICOM file's elements, in the type that they are meant to be.

A value may come as text, in another VR than its own, several times, or as rubbish. What cannot be
read for certain is refused by its element's name. No text of a file is ever put into a message, as
it may be a name.
"""

from __future__ import annotations

import functools
import logging
import math
import re
import struct
import zlib
from collections.abc import MutableSequence
from typing import TYPE_CHECKING, Any

from edgekd.records import EdgeKDError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

INSTALL = "pip install 'edgekd[dicom]'"
# pydicom and its decoders have no base class of errors: a malformed file raises whatever the
# parser stumbles on, and `broken` what is pydicom's own.
_BROKEN = (OSError, EOFError, ValueError, TypeError, AttributeError, LookupError, RuntimeError,
           ArithmeticError, struct.error, zlib.error)  # fmt: skip
_PADDING = " \0\t\r\n"
# As the VR DS has it, with a point or, which it has not, a comma; Python's own takes 1_000 as well
_NUMBER = re.compile(r"[+-]?([0-9]+[.,]?[0-9]*|[.,][0-9]+)([eE][+-]?[0-9]+)?")
_GROUPED = re.compile(r"[+-]?[1-9][0-9]{0,2},[0-9]{3}")  # a decimal, a thousand, or two values


@functools.cache
def pydicom() -> Any:
    """The package, told not to speak: its warnings quote values."""
    try:
        import pydicom
    except ModuleNotFoundError:
        raise EdgeKDError(f"a DICOM file needs pydicom: {INSTALL}") from None
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    return pydicom


@functools.cache
def broken() -> tuple[type[Exception], ...]:
    """What a malformed file may raise."""
    pydicom()
    from pydicom.errors import BytesLengthException, InvalidDicomError

    return *_BROKEN, BytesLengthException, InvalidDicomError


def held(ds: Dataset, keyword: str) -> list[Any]:
    """The values of an element; none where it is absent or empty. A 0 is a value."""
    try:
        value = ds.get(keyword)
    except broken():
        raise EdgeKDError(f"DICOM with a {keyword} that cannot be read: export it again") from None
    values = list(value) if isinstance(value, MutableSequence) else [value]
    return values if any(map(_says, values)) else []


def text(ds: Dataset, keyword: str) -> str:
    """An element's words in capitals; "" where it is absent or empty."""
    return "\\".join(str(v).strip(_PADDING).upper() for v in held(ds, keyword))


def numbers(ds: Dataset, keyword: str, most: int | None = None) -> list[float]:
    """The values of an element, or the first `most` of them, as finite numbers."""
    found = [_parsed(v) for v in held(ds, keyword)[:most]]
    if not all(map(math.isfinite, found)):
        raise EdgeKDError(
            f"DICOM with a {keyword} that is no number such as 1024.5: export it again"
        )
    return found


def number(ds: Dataset, keyword: str, default: float | None = None) -> float:
    """The one value of an element; EdgeKDError if there are others, or neither it nor a default."""
    found = numbers(ds, keyword)
    if len(set(found)) > 1:
        raise EdgeKDError(
            f"DICOM with {len(found)} values of {keyword} where one belongs: export it again"
        )
    if not found and default is None:
        raise EdgeKDError(f"DICOM without {keyword}: export it again")
    return found[0] if found else float(default or 0)


def whole(ds: Dataset, keyword: str, default: int | None = None) -> int:
    """The one value of an element, an integer; else as `number`."""
    found = number(ds, keyword, default)
    if found != int(found):
        raise EdgeKDError(f"DICOM with a {keyword} that is no whole number: export it again")
    return int(found)


def plain(value: Any, keyword: str) -> Any:
    """A value without the character set that it came in."""
    from pydicom.multival import MultiValue
    from pydicom.valuerep import PersonName

    if isinstance(value, MultiValue):
        return [plain(v, keyword) for v in value]
    if isinstance(value, (str, PersonName)):
        return str(value)
    if value is None or isinstance(value, (int, float)):
        return value
    raise EdgeKDError(f"DICOM with a {keyword} that is no text: export it again")


def _says(value: Any) -> bool:
    """Whether there is anything in a value."""
    if value is None or isinstance(value, bytes):
        return bool(value)
    return bool(str(value).strip(_PADDING))


def _parsed(value: Any) -> float:
    """A number; nan for what is none, or not for certain."""
    written = str(getattr(value, "original_string", value)).strip(_PADDING)
    if not _NUMBER.fullmatch(written) or _GROUPED.fullmatch(written):
        return math.nan
    return float(written.replace(",", "."))
