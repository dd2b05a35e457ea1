"""The gateway never needs torch, and neither gateway nor desk reaches into the engine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "src" / "penstock"
GATEWAY_MAY = {"core", "policies", "replica", "desk", "models", "gateway"}
DESK_MAY = {"core", "policies", "desk"}


def rooms_imported_by(room: str) -> set[str]:
    text = "\n".join(path.read_text() for path in (SOURCE / room).glob("*.py"))
    return set(re.findall(r"^\s*from penstock\.(\w+)", text, flags=re.MULTILINE))


def test_the_rooms_point_one_way() -> None:
    assert rooms_imported_by("gateway") <= GATEWAY_MAY
    assert rooms_imported_by("desk") <= DESK_MAY


def test_the_desk_reads_no_clock_and_does_no_io() -> None:
    text = "\n".join(path.read_text() for path in (SOURCE / "desk").glob("*.py"))
    banned = r"^\s*(?:import|from) (time|asyncio|random|logging|os|socket|threading)\b"
    assert re.findall(banned, text, flags=re.MULTILINE) == []


def test_serving_over_http_does_not_load_torch() -> None:
    check = "import sys, penstock.gateway.app, penstock.gateway.server; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
