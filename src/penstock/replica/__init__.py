"""One replica's brain: the step loop, sequences, KV accounting, the prefix index.

Pure: time is an argument.
"""
