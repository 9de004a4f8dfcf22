"""What is known of the techniques and of this installation, as values and as tables."""

from omniconv.analysis.cost import STATUSES, Cost, Counts, Coverage, ModuleCost, Row, cost, flop_formulas
from omniconv.analysis.untouched import untouched

__all__ = ["STATUSES", "Cost", "Counts", "Coverage", "ModuleCost", "Row", "cost", "flop_formulas", "untouched"]
