"""Multipart forms with a file, also from clients that percent-encode its name."""

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
# RFC 5987: filename*=charset'language'percent-encoded. No codec but the two of the RFC is given data of a client.
_EXTENDED = re.compile(rb";\s*filename\*\s*=\s*([^;\s]*)", re.IGNORECASE)
_VALUE = re.compile(rb"(utf-8|iso-8859-1)'[^']*'([^']*)", re.IGNORECASE)


@asynccontextmanager
async def read_form(request: Request, *, max_files: int, max_fields: int) -> AsyncIterator[FormData]:
    """Read a multipart/form-data body; its files are closed at the end of the block.

    Raises:
        HTTPException: 400, if it cannot be parsed or has more than `max_files` files or `max_fields` other fields.
    """
    try:
        async with aclosing(request.stream()) as body:
            form = await _Parser(request.headers, body, max_files=max_files, max_fields=max_fields).parse()
    except MultiPartException as error:
        raise HTTPException(400, error.message) from error
    try:
        yield form
    finally:
        await form.close()


class _Parser(MultiPartParser):
    """Parser that also reads file names in the notation of RFC 5987. Such a name takes precedence over `filename`."""

    def on_headers_finished(self) -> None:
        part = self._current_part
        extended = _EXTENDED.search(_QUOTED.sub(b"", part.content_disposition or b""))
        if extended and b"filename" not in parse_options_header(part.content_disposition)[1]:
            part.content_disposition = (part.content_disposition or b"") + b'; filename=""'  # makes it a file
        super().on_headers_finished()
        value = extended and _VALUE.fullmatch(extended[1])
        if value and part.file is not None:
            try:
                part.file.filename = unquote_to_bytes(value[2]).decode(value[1].decode())
            except UnicodeDecodeError:
                return  # an invalid name does not count
