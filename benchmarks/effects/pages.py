"""What `--write` leaves: pages and pictures of policies in docs/policies/, and rows in docs/policies.md.

A row of a policy that was not run is kept. Results on this machine's engine are kept in live.json, so that
they outlast a run of the twin alone.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from benchmarks.effects.effect import Claim, Effect, Measured
from penstock.core.config import default_of
from penstock.policies.registry import Entry
from penstock.policies.stack import REGISTRIES, load_preset, preset_names
from penstock.workloads.charts import standalone

ROOT: Final = Path(__file__).parents[2]
GUIDE: Final = ROOT / "docs" / "policies.md"
FOLDER: Final = ROOT / "docs" / "policies"
LIVE: Final = Path(__file__).with_name("live.json")
BEGIN: Final = "<!-- effects: written by `python -m benchmarks.effects --write` -->"
END: Final = "<!-- end of effects -->"
NOTE: Final = "<!-- Written by `python -m benchmarks.effects --write`; do not edit. -->"
HEADER: Final = (
    "| Policy | What its source claims | Here, in the twin | On the CPU engine | Where it loses |",
    "| --- | --- | --- | --- | --- |",
)


@dataclass(frozen=True)
class Results:
    """An effect and what its scenarios gave. `live` as `live_of` keeps it; None where it was never run."""

    effect: Effect
    wins: Measured
    loses: Measured
    live: dict[str, Any] | None


def write(results: Sequence[Results]) -> list[Path]:
    """Pages, pictures and rows of these effects; returns what was written."""
    FOLDER.mkdir(exist_ok=True)
    written: list[Path] = []
    for _, group in groupby(results, key=lambda each: each.effect.name):
        of_policy = list(group)
        effect = of_policy[0].effect
        stem = page_stem(effect.slot, effect.policy)
        for old in FOLDER.glob(f"{stem}*.svg"):
            if re.fullmatch(rf"{re.escape(stem)}(-\d+)?", old.stem):
                old.unlink()
        pictures = [standalone(chart) for each in of_policy for chart in each.wins.charts]
        paths = [FOLDER / f"{stem}{f'-{index}' if index else ''}.svg" for index in range(len(pictures))]
        for path, picture in zip(paths, pictures, strict=True):
            path.write_text(picture, encoding="utf-8")
        page = FOLDER / f"{stem}.md"
        page.write_text(page_of(of_policy), encoding="utf-8")
        written += [page, *paths]
    GUIDE.write_text(with_rows(GUIDE.read_text(encoding="utf-8"), results), encoding="utf-8")
    return [*written, GUIDE]


def page_stem(slot: str, policy: str) -> str:
    return f"{slot}-{policy}"


# ---- what ran on the engine -------------------------------------------------------------------------------


def keep_live(effect: Effect, measured: Measured, machine: str) -> None:
    """Into live.json, in place of what stood there for this effect."""
    kept = json.loads(LIVE.read_text()) if LIVE.exists() else {}
    kept[live_key(effect)] = {
        "machine": machine,
        "said": measured.said,
        "claims": [str(claim) for claim in measured.claims],
    }
    LIVE.write_text(json.dumps(dict(sorted(kept.items())), indent=1, ensure_ascii=False) + "\n")


def live_of(effect: Effect) -> dict[str, Any] | None:
    if effect.live is None or not LIVE.exists():
        return None
    found: dict[str, Any] | None = json.loads(LIVE.read_text()).get(live_key(effect))
    return found


def live_key(effect: Effect) -> str:
    """An effect's own: a policy may have several, told apart by the function that measures."""
    name = getattr(effect.live, "__name__", "live")
    return effect.name if name == "live" else f"{effect.name}#{name}"


# ---- the table --------------------------------------------------------------------------------------------


def with_rows(text: str, results: Sequence[Results]) -> str:
    """`text` with the rows of `results` put in; rows of policies that no longer exist go."""
    before, _, rest = text.partition(BEGIN)
    old, _, after = rest.partition(END)
    assert rest and after, f"{GUIDE.name} has lost its markers"
    names = {each.effect.name for each in results}
    known = {f"{slot}/{name}" for slot, registry in REGISTRIES.items() for name in registry.names()}
    kept = [(name, row) for row in old.splitlines() if (name := row_name(row)) in known - names]
    rows = sorted([*kept, *((each.effect.name, row_of(each)) for each in results)], key=lambda row: row[0])
    table = "\n".join([*HEADER, *(row for _, row in rows)])
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def row_name(row: str) -> str:
    """`slot/policy` of a row of the table, or nothing."""
    match = re.match(r"\| (\w+) \[`([\w-]+)`\]\(", row)
    return f"{match[1]}/{match[2]}" if match else ""


def row_of(results: Results) -> str:
    effect, live = results.effect, results.live
    link = f"{effect.slot} [`{effect.policy}`](policies/{page_stem(effect.slot, effect.policy)}.md)"
    on_engine = live["said"] if live else effect.not_live or ("–" if effect.live is None else "not run yet")
    cells = (link, effect.headline, results.wins.said, on_engine, results.loses.said)
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


# ---- the page ---------------------------------------------------------------------------------------------


def page_of(results: Sequence[Results]) -> str:
    """All effects of one policy."""
    effect = results[0].effect
    entry = REGISTRIES[effect.slot].entry(effect.policy)
    parts = [
        f"# `{effect.policy}`",
        NOTE,
        f"Slot `{effect.slot}`. Source: {entry.source}.",
        inspect.getdoc(entry.make) or "",
        *options_of(entry),
        *conflicts_of(entry),
        *presets_of(effect.slot, effect.policy),
    ]
    picture = 0
    for each in results:
        parts += ["## Its effect", f"Claimed: {each.effect.headline}.", *stack_of(each.effect)]
        parts += ["### Where it wins, in the twin", *scenario(each.effect.wins, each.wins)]
        for chart in each.wins.charts:
            name = page_stem(effect.slot, effect.policy) + (f"-{picture}" if picture else "")
            parts.append(f"![{chart.title}: {chart.subtitle}]({name}.svg)")
            picture += 1
        parts += ["### Where it loses, in the twin", *scenario(each.effect.loses, each.loses)]
        parts += ["### On the CPU engine", *on_engine(each)]
    parts += [
        "## To see it",
        f"```sh\npython -m benchmarks.effects {effect.name}\n```",
        "All policies: [policies.md](../policies.md). Options of every policy: "
        "[reference](../reference/policies.md).",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def options_of(entry: Entry[Any]) -> list[str]:
    rows = [
        f"| `{item.name}` | `{json.dumps(default_of(item))}` | {item.metadata['help']} |"
        for item in fields(entry.options)
    ]
    if not rows:
        return []
    table = "\n".join(["| Key | Default | Meaning |", "| --- | --- | --- |", *rows])
    return [f"Options, in `[policies.options.{entry.name}]`:", table]


def conflicts_of(entry: Entry[Any]) -> list[str]:
    said = [f"- not beside `{other}`: {why}" for other, why in sorted(entry.conflicts.items())]
    return ["\n".join(said)] if said else []


def presets_of(slot: str, policy: str) -> list[str]:
    using = [f"`{name}`" for name in preset_names() if load_preset(name)["policies"].get(slot) == policy]
    return [f"Presets with it: {', '.join(using)}."] if using else []


def stack_of(effect: Effect) -> list[str]:
    if not effect.settings:
        return []
    told = ", ".join(f"`{key} = {value}`" for key, value in effect.settings.items())
    return [f"Around it: {told}."]


def scenario(run: Callable[[], Measured], measured: Measured) -> list[str]:
    """What was done, in the words of its function, and what came of it."""
    return [words_of(run), told(measured.said), claims_table(measured.claims)]


def words_of(run: Callable[[], Measured]) -> str:
    """Its docstring; several effects may share a function, each with arguments of its own."""
    return inspect.getdoc(run.func if isinstance(run, partial) else run) or ""


def told(said: str) -> str:
    """A cell of the table as a sentence."""
    return f"**{said[0].upper()}{said[1:]}.**"


def claims_table(claims: Sequence[Claim]) -> str:
    rows = [f"| {claim.what} | {claim.value:.4g} | {claim.bounds} |".replace("||", "|") for claim in claims]
    return "\n".join(["| Measured | Value | Must be |", "| --- | ---: | --- |", *rows])


def on_engine(results: Results) -> list[str]:
    effect, live = results.effect, results.live
    if effect.live is None:
        reason = effect.not_live or "it has no scenario of its own there"
        return [f"Not shown: {reason}."]
    command = f"```sh\npython -m benchmarks.effects {effect.name} --live\n```"
    if live is None:
        return ["Not run yet.", command]
    claims = "\n".join(f"- {claim}" for claim in live["claims"])
    return [words_of(effect.live), told(live["said"]), claims, live["machine"], command]
