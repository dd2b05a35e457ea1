"""Show the effects of policies, and write them down.

    python -m benchmarks.effects [NAME ...] [--live] [--write]

NAME is a slot, a policy or `slot/policy`; none: all. The twin's scenarios take seconds and give the same
numbers everywhere. `--live` also runs what can be shown on this machine's CPU engine, minutes in all, on an
otherwise idle machine. `--write` renews the rows of these policies in docs/policies.md and their pages and
pictures in docs/policies/, and keeps live results in live.json. Exit code 1 when a claim fails.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.effects.effect import Effect, Measured, all_effects
from benchmarks.effects.pages import ROOT, Results, keep_live, live_of, write
from benchmarks.results import describe_machine
from penstock.engine.threads import wait_briefly


def show(title: str, measured: Measured) -> None:
    print(f"  {title}: {measured.said}")
    for claim in measured.claims:
        print(f"    {claim}")


def chosen(names: list[str]) -> list[Effect]:
    found = [e for e in all_effects() if not names or {e.slot, e.policy, e.name} & set(names)]
    if not found:
        known = ", ".join(effect.name for effect in all_effects())
        sys.exit(f"no effect is called {' '.join(names)}; known: {known}")
    return found


def measure(effect: Effect, live: bool, keep: bool) -> tuple[Results, bool]:
    """Run what was asked for, and say it; whether every claim holds. `keep` a live result for later pages."""
    print(f"{effect.name}: {effect.headline}")
    wins, loses = effect.wins(), effect.loses()
    show("wins", wins)
    show("loses", loses)
    holds = wins.holds and loses.holds
    if live and effect.live is not None:
        measured = effect.live()
        show("live", measured)
        if keep:
            keep_live(effect, measured, describe_machine())
        holds &= measured.holds
    return Results(effect, wins, loses, live_of(effect)), holds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--live", action="store_true", help="also on this machine's CPU engine")
    parser.add_argument("--write", action="store_true", help="renew docs/policies.md and docs/policies/")
    arguments = parser.parse_args()
    if arguments.live:
        wait_briefly()  # before anything loads torch
    measured = [measure(effect, arguments.live, arguments.write) for effect in chosen(arguments.names)]
    if arguments.write:
        for path in write([results for results, _ in measured]):
            print(path.relative_to(ROOT))
    sys.exit(0 if all(holds for _, holds in measured) else 1)


if __name__ == "__main__":
    main()
