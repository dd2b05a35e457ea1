"""Reading the settings for a command, and the commands that show them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.core.errors import ConfigError

if TYPE_CHECKING:
    from penstock.core.config import Resolved

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="TOML file; without it `penstock.toml` is read where it exists."),
]
DEFAULT_FILE = Path("penstock.toml")


def read_settings(config: Path | None, flags: dict[str, Any]) -> Resolved:
    """Flags over environment over file over preset over defaults. Raises ConfigError."""
    from penstock.core.config import resolve
    from penstock.policies.stack import load_preset

    path = config or (DEFAULT_FILE if DEFAULT_FILE.is_file() else None)
    text = None
    if path is not None:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"`{path}` cannot be read: {error}", hint="Check `--config`.") from None
    return resolve(
        file_text=text,
        file_name=str(path) if path else "",
        environ=os.environ,
        flags=flags,
        load_preset=load_preset,
    )


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="Show the settings a server would run on.", no_args_is_help=True)
    group.command("show")(show)
    app.add_typer(group, name="config")
    app.command("policies")(policies)


def show(
    config: ConfigOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print every setting, its value, and where it came from.

    Example: `penstock config show --config penstock.toml`
    """
    from dataclasses import asdict, is_dataclass

    rows = [
        (key, asdict(value) if is_dataclass(value) and not isinstance(value, type) else value, origin)
        for key, value, origin in read_settings(config, {}).shown()
    ]
    if as_json:
        print(json.dumps({key: {"value": value, "origin": origin} for key, value, origin in rows}, indent=2))
        return
    width = max(len(key) for key, _, _ in rows)
    for key, value, origin in rows:
        print(f"{key:<{width}}  {json.dumps(value):<28} {origin}")


def policies(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the slots, the policies that fill them, and the presets.

    Example: `penstock policies --json`
    """
    from dataclasses import fields

    from penstock.core.config import default_of
    from penstock.policies.stack import REGISTRIES, load_preset, preset_names

    slots: dict[str, list[dict[str, Any]]] = {
        slot: [
            {
                "name": entry.name,
                "summary": entry.summary,
                "source": entry.source,
                "options": {
                    item.name: {"default": default_of(item), "help": item.metadata["help"]}
                    for item in fields(entry.options)
                },
            }
            for entry in registry.entries()
        ]
        for slot, registry in REGISTRIES.items()
    }
    presets = {name: load_preset(name) for name in preset_names()}
    if as_json:
        print(json.dumps({"slots": slots, "presets": presets}, indent=2))
        return
    for slot, entries in slots.items():
        print(slot)
        for entry in entries:
            print(f"  {entry['name']:<20} {entry['summary']}\n  {'':<20} {entry['source']}")
            options: dict[str, Any] = entry["options"]
            for name, option in options.items():
                print(f"  {'':<20} {name} = {option['default']}: {option['help']}")
    print("presets")
    for name, preset in presets.items():
        slots_of = {slot: policy for slot, policy in preset["policies"].items() if slot != "options"}
        stack = ", ".join(f"{slot}={policy}" for slot, policy in slots_of.items())
        print(f"  {name:<20} {preset['summary']}\n  {'':<20} {stack}")
        for policy, table in preset["policies"].get("options", {}).items():
            for option, value in table.items():
                print(f"  {'':<20} {policy}.{option} = {value}")
