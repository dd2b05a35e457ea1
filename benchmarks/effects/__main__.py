"""Show the effects of policies, and write them down.

    python -m benchmarks.effects [NAME ...] [--live] [--write]

NAME is a slot, a policy or `slot/policy`; none: all. The twin's scenarios take seconds and give the same
numbers everywhere. `--live` also runs what can be shown on this machine's CPU engine, minutes in all, on an
otherwise idle machine. `--write` renews the table in docs/policies.md and the pages in docs/policies/.
Exit code 1 when a claim fails.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.effects.effect import Effect, Measured, all_effects


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--live", action="store_true", help="also on this machine's CPU engine")
    arguments = parser.parse_args()
    failed = False
    for effect in chosen(arguments.names):
        print(f"{effect.name}: {effect.headline}")
        parts = [("wins", effect.wins()), ("loses", effect.loses())]
        if arguments.live and effect.live is not None:
            parts.append(("live", effect.live()))
        for title, measured in parts:
            show(title, measured)
            failed |= not measured.holds
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
