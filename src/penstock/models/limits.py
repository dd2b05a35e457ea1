"""Bounds on what a model file may claim. Generous multiples of the largest published open models.

They keep a hostile or damaged file from making us allocate or loop without measure; no real model is near.
"""

from __future__ import annotations

from typing import Final

VOCAB_MAX: Final = 1 << 24
WIDTH_MAX: Final = 1 << 20  # hidden and feed-forward widths
LAYERS_MAX: Final = 1024
HEADS_MAX: Final = 1024
HEAD_DIM_MAX: Final = 4096
EXPERTS_MAX: Final = 1024
EXPERTS_ALL_LAYERS_MAX: Final = 1 << 16
CONTEXT_LEN_MAX: Final = 1 << 24
THETA_MAX: Final = 1e12
FACTOR_MAX: Final = 1e6
SOFTCAP_MAX: Final = 1e6
SCALAR_MAX: Final = 1e6
EOS_TOKENS_MAX: Final = 256
