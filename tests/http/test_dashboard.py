"""The page at `/`: it comes, fetches nothing from elsewhere, and reads metrics that exist."""

from __future__ import annotations

import re
from collections.abc import Callable

from served import Running


def test_the_page_names_only_metrics_that_the_server_has(serve: Callable[..., Running]) -> None:
    client = serve().http()
    page = client.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert page.headers["x-request-id"]
    metrics = client.get("/metrics").text
    names = set(re.findall(r'"(vllm:[a-z_]+)"', page.text))
    assert len(names) >= 8
    for name in names:
        assert f"\n{name}" in metrics, name


def test_the_page_fetches_from_this_server_only(serve: Callable[..., Running]) -> None:
    page = serve().http().get("/").text
    assert "://" not in page
    assert all(path.startswith("/") for path in re.findall(r'fetch\("([^"]*)"', page))
