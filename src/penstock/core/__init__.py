"""Nouns, units, errors, events, config and metric definitions. Imports nothing of ours."""
