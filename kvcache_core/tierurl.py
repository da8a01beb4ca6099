"""A tier's URL and its options, read with errors that name the tier, show no password and say what to write instead."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from urllib.parse import parse_qsl, urlsplit

from kvcache_core.errors import InvalidInput
from kvcache_core.sizes import parse_memory

__all__ = ["TierUrl", "without_password"]


class TierUrl:
    """A URL and the options behind its ``?``.

    Args:
        url: as the user wrote it.
        form: how it is meant to look, for messages.
        allowed: the options that the tier has.

    Attributes:
        parts: of the URL, as ``urllib.parse.urlsplit`` gives them.

    Raises:
        InvalidInput: it is no URL, has an option that the tier does not have, or one twice.
    """

    def __init__(self, url: str, form: str, allowed: Sequence[str]) -> None:
        self._url, self._form = url, form
        try:
            self.parts = urlsplit(url)
        except ValueError as error:
            raise self.error(str(error)) from None
        pairs = parse_qsl(self.parts.query, keep_blank_values=True)
        self._options = dict(pairs)
        unknown = sorted(set(self._options) - set(allowed))
        if unknown:
            raise self.error(f"unknown option {unknown[0]!r}; there are {', '.join(allowed)}")
        if len(self._options) != len(pairs):
            raise self.error("an option stands twice")

    def error(self, message: str) -> InvalidInput:
        """What to raise when ``message`` is wrong with it."""
        return InvalidInput(f"tier {without_password(self._url)!r}: {message}; the form is {self._form}")

    @property
    def port(self) -> int | None:
        """The port, or None if there is none."""
        try:
            return self.parts.port
        except ValueError:
            raise self.error("the port must be a number from 0 to 65535") from None

    def given(self, *names: str) -> list[str]:
        """Which of these options it has."""
        return [name for name in names if name in self._options]

    def text(self, name: str) -> str | None:
        """An option as it stands there, or None."""
        return self._options.get(name)

    def switch(self, name: str, *, default: bool) -> bool:
        """An option that is ``on`` or ``off``."""
        text = self._options.get(name, "on" if default else "off")
        if text not in ("on", "off"):
            raise self.error(f"{name} must be 'on' or 'off', got {text!r}")
        return text == "on"

    def seconds(self, name: str, default: float, *, whole: bool = False) -> float:
        """An option in seconds, more than zero; with ``whole`` a whole number of them."""
        text = self._options.get(name)
        try:
            value = default if text is None else int(text) if whole else float(text)
        except ValueError:
            value = 0
        if not (value > 0 and math.isfinite(value)):
            number = "a whole number of seconds, at least 1" if whole else "a number of seconds above 0"
            raise self.error(f"{name} must be {number}, got {text!r}")
        return value

    def size(self, name: str, default: str, *, least: int) -> int:
        """An option in bytes, at least ``least``."""
        try:
            value = parse_memory(self._options.get(name, default))
        except InvalidInput as error:
            raise self.error(str(error).replace("memory", name, 1)) from None
        if value < least:
            raise self.error(f"{name} must be at least {least:,} bytes, got {value:,}")
        return value


def without_password(url: str) -> str:
    """What may be shown of a URL.

    Example:
        >>> without_password("valkey://me:secret@host:6379/0")
        'valkey://me:***@host:6379/0'
    """
    return re.sub(r"(://[^:@]*:).*(?=@)", r"\1***", url, flags=re.DOTALL)
