"""Each policy's published effect, shown by our own code: in the twin, and on the real CPU engine.

One module a policy or card, with `EFFECTS`, a tuple of `effect.Effect`; `python -m benchmarks.effects -h`.
"""
