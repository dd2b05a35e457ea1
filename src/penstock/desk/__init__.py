"""The front desk's decisions: feasibility, entry, the line, and what the engine gets next. No I/O."""

from penstock.desk.desk import Desk
from penstock.desk.feasibility import Capacity, fit_output

__all__ = ["Capacity", "Desk", "fit_output"]
