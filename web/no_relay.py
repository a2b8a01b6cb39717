"""This server hands out its own files, and fetches nobody else's."""

from __future__ import annotations

import re

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

_ELSEWHERE = re.compile(r"/(file[=/]|proxy=)\s*[a-z][a-z0-9+.-]*:/", re.IGNORECASE)


class NoRelay:
    """ASGI middleware: answers 403 where Gradio would fetch another site's file and pass it on as this site's."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _ELSEWHERE.search(scope["path"]):
            answer = PlainTextResponse("Files of other sites are not served here.", status_code=403)
            await answer(scope, receive, send)
            return
        await self.app(scope, receive, send)
