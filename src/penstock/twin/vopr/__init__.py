"""Deterministic fault simulation of the whole system from one number: `penstock vopr SEED`.

    seed ─► draw ─► Script ─► World: front (desk) ◄─ pipes ─► engine (replica, strict executor) ─► RunResult
                                └── checkers look on from outside ──┘        failure ─► shrink ─► script.json

A script is plain data and says everything: the system, the load, every fault. A run has no other input.
"""

from penstock.twin.vopr.draw import draw_script
from penstock.twin.vopr.run import RunResult, run_checked, run_script
from penstock.twin.vopr.script import Call, Fault, Script, System
from penstock.twin.vopr.shrink import shrink

__all__ = [
    "Call",
    "Fault",
    "RunResult",
    "Script",
    "System",
    "draw_script",
    "run_checked",
    "run_script",
    "shrink",
]
