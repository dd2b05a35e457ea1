"""How a check says that it failed."""

from __future__ import annotations


class CheckFailed(Exception):
    """`check` names the checker: a script shrinks as long as the same one fails."""

    def __init__(self, check: str, message: str) -> None:
        super().__init__(f"{check}: {message}")
        self.check = check
        self.message = message


def require(holds: bool, check: str, message: str) -> None:
    """Raise CheckFailed unless `holds`. Where the message is dear, ask first and raise yourself."""
    if not holds:
        raise CheckFailed(check, message)
