"""Read, describe, reshape and replay request traces, and report what came of it. Imports only `core`."""
