"""The command line. Thin: parses flags, calls a room, prints."""
