"""Penstock serves language models to many tenants and predicts what a change will do.

Importing this package is cheap: torch, the HTTP server and the report libraries are
imported where they are used.
"""

from penstock import compiled

__version__ = "0.1.0"

compiled.install()

__all__ = ["__version__"]
