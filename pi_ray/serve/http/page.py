"""The page at /: a query, answered by the base model with the full prompt and by the adapter without it, side by side.

The page itself holds nothing secret and needs no key; what it asks for under /v1/ does.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

from fastapi.responses import HTMLResponse

PATH = "/"


@cache
def text() -> str:
    return files("pi_ray.serve.http").joinpath("page.html").read_text(encoding="utf-8")


@cache
def headers() -> dict[str, str]:
    """Only the page's own script runs, and it may talk to this server alone."""
    script = re.search(r"<script>(.*?)</script>", text(), re.S).group(1)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}


async def page() -> HTMLResponse:
    return HTMLResponse(text(), headers=headers())
