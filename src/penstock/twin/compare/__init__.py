"""Policy stacks side by side: the same trace, the same machine, at several rates."""
