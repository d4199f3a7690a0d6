"""The page at /: a query answered side by side by the base model with the full prompt and by the adapter without it.

The page itself holds nothing secret and needs no key; the paths under /v1/ that it calls do.
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
def page_html() -> str:
    return files("pi_ray.serve.http").joinpath("page.html").read_text(encoding="utf-8")


@cache
def page_headers() -> dict[str, str]:
    """A policy under which only the page's own script runs, and talks to this server alone."""
    [script] = re.findall(r"<script>(.*?)</script>", page_html(), re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {
        "Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }  # fmt: skip


async def get_page() -> HTMLResponse:
    return HTMLResponse(page_html(), headers=page_headers())
