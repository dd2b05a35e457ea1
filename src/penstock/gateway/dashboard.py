"""The page at `/`: what the server does now, read from its own `/metrics` by the browser."""

from __future__ import annotations

from functools import cache
from importlib import resources

from starlette.responses import HTMLResponse, Response

# The page fetches from this server only, and nothing may be put into it from outside.
_POLICY = "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@cache
def _page() -> str:
    return (resources.files("penstock.gateway") / "dashboard.html").read_text(encoding="utf-8")


def answer_dashboard() -> Response:
    return HTMLResponse(_page(), headers={"content-security-policy": _POLICY})
