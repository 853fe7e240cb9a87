"""Forms with a file, as different clients write them."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from urllib.parse import unquote_to_bytes

from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

_QUOTED = re.compile(rb'"(?:[^"\\]|\\.)*"')
_EXTENDED = re.compile(rb";\s*filename\*\s*=\s*([^;\s]*)", re.IGNORECASE)
_CHARSETS = ("utf-8", "iso-8859-1")  # those that RFC 5987 names: no other codec is given what a client sends


@asynccontextmanager
async def read_form(request: Request, *, max_files: int, max_fields: int) -> AsyncIterator[FormData]:
    """Reads a form of the type multipart/form-data; its files are closed at the end of the block.

    Raises:
        HTTPException: 400, if it cannot be parsed or holds more than so many files or other fields.
    """
    try:
        async with aclosing(request.stream()) as body:
            parser = _Parser(request.headers, body, max_files=max_files, max_fields=max_fields)
            form = await parser.parse()
    except MultiPartException as error:
        raise HTTPException(400, error.message) from error
    try:
        yield form
    finally:
        await form.close()


class _Parser(MultiPartParser):
    """Also takes names of files as RFC 5987 writes them, `filename*=UTF-8''%C3%A4.png`; they replace `filename`."""

    def on_headers_finished(self) -> None:
        part = self._current_part
        extended = _EXTENDED.search(_QUOTED.sub(b"", part.content_disposition or b""))
        if extended and b"filename" not in parse_options_header(part.content_disposition)[1]:
            part.content_disposition = (part.content_disposition or b"") + b'; filename=""'  # it is a file
        super().on_headers_finished()
        if extended and part.file is not None and (name := _decoded(extended[1])) is not None:
            part.file.filename = name


def _decoded(value: bytes) -> str | None:
    """The text of `charset'language'percent-encoded`; None if it cannot be decoded."""
    charset, *rest = value.split(b"'")
    name = charset.decode("ascii", "replace").lower()
    if len(rest) != 2 or name not in _CHARSETS:
        return None
    try:
        return unquote_to_bytes(rest[1]).decode(name)
    except UnicodeDecodeError:
        return None
