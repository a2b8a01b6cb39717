"""A limit on how much a visitor may send in one request."""

from __future__ import annotations

from contextlib import suppress

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 1_000_000
"""The longest prompt takes a hundredth of this."""


class BodyLimit:
    """ASGI middleware: answers 413 to a body of more than `MAX_BODY_BYTES`, whether or not it says its length.

    File uploads pass: Gradio has a limit of its own for them (`max_file_size`).
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].rstrip("/").endswith("/upload"):
            await self.app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            await _too_large(scope, receive, send)
            return
        received = 0
        begun = exceeded = False

        async def counted_receive() -> Message:
            nonlocal received, exceeded
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY_BYTES and not begun:
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
