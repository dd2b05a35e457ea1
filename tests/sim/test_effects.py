"""Every policy wins by its card's effect, and loses where it must; its page says by how much."""

from __future__ import annotations

import pytest
from benchmarks.effects.effect import Effect, Measured, all_effects
from benchmarks.effects.pages import FOLDER, page_stem, told
from benchmarks.effects.serving import AZURE

CASES = [
    pytest.param(effect, kind, id=f"{effect.name}-{kind}")
    for effect in all_effects()
    for kind in ("wins", "loses")
]


@pytest.mark.skipif(not AZURE.exists(), reason="the public traces are not beside the project")
@pytest.mark.parametrize(("effect", "kind"), CASES)
def test_the_effect_shows(effect: Effect, kind: str) -> None:
    measured: Measured = getattr(effect, kind)()
    assert measured.claims
    assert measured.holds, "\n".join(map(str, measured.claims))
    page = FOLDER / f"{page_stem(effect.slot, effect.policy)}.md"
    assert not page.exists() or told(measured.said) in page.read_text(encoding="utf-8"), (
        f"{page.name} is old: run `python -m benchmarks.effects {effect.name} --write`"
    )
