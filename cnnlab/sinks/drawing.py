"""Tables and the live display: rich, with what people wrote taken as text and never as markup."""

from __future__ import annotations

from typing import IO, Any

from rich.console import Console
from rich.style import Style
from rich.text import Text

from cnnlab.terminal import Stream, fitting, one_line, printable, stream


class _Drawn:
    """The stream as rich writes to it: its escape sequences are meant."""

    def __init__(self, inner: Stream):
        self._inner = inner

    def write(self, text: str) -> int:
        self._inner.draw(text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class Drawing(Console):
    """A rich console on which `[crop,flip]` and `:smile:` are what they say, on a stream that cannot fail.

    Args:
        inner: where to draw, for example `sys.stdout`.
        elsewhere: columns where it is no terminal; `None` leaves it to rich.
    """

    def __init__(self, inner: IO[str] | None, *, elsewhere: int | None = None, **settings: Any):
        out = stream(inner)
        width = None if out.isatty() else elsewhere
        drawn: Any = _Drawn(out)
        super().__init__(file=drawn, width=width, markup=False, emoji=False, highlight=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:  # type: ignore[override]
        return super().render_str(fitting(printable(text), self.encoding), **settings)

    def plain(self, text: object, style: str | Style = "") -> Text:
        """A cell of a table, or a word on a line: text that somebody wrote, in the characters that the stream has."""
        return Text(fitting(one_line(text), self.encoding), style)


def plain(text: object, style: str | Style = "") -> Text:
    """The same where the stream is not known yet."""
    return Text(one_line(text), style)
