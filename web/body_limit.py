"""A limit on how much a visitor may send in one request."""

from __future__ import annotations

from contextlib import suppress

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 1_000_000
"""The longest prompt takes a hundredth of this."""
MAX_UPLOAD_BYTES = 11_000_000
"""One file of the largest size that Gradio takes (`max_file_size`). Of many files in one request it limits each."""
_UPLOAD_ROUTE = "/gradio_api/upload"


class BodyLimit:
    """ASGI middleware: answers 413 to a body of more than `MAX_BODY_BYTES`, whether or not it says its length.

    For uploads of files it is `MAX_UPLOAD_BYTES`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # Not just "/upload": an event could be called that, and takes as much JSON as it gets.
        uploads = scope["path"].rstrip("/").endswith(_UPLOAD_ROUTE)
        limit = MAX_UPLOAD_BYTES if uploads else MAX_BODY_BYTES
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > limit:
            await _too_large(scope, receive, send)
            return
        received = 0
        begun = exceeded = False

        async def counted_receive() -> Message:
            nonlocal received, exceeded
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit and not begun:
                exceeded = True
                raise _TooLarge
            return message

        async def noted_send(message: Message) -> None:
            nonlocal begun
            if not exceeded:  # or it would be the app's own answer to what `counted_receive` raised
                begun = True
                await send(message)

        with suppress(_TooLarge):
            await self.app(scope, counted_receive, noted_send)
        if exceeded:
            await _too_large(scope, receive, send)


class _TooLarge(Exception):
    """More came than was announced, or nothing was announced at all."""


async def _too_large(scope: Scope, receive: Receive, send: Send) -> None:
    answer = PlainTextResponse("The request is too large.", status_code=413, headers={"connection": "close"})
    await answer(scope, receive, send)
