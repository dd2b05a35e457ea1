"""Every decision, pure: no clock, no I/O, no randomness but a named stream.

One folder a slot, one file a policy.
"""
