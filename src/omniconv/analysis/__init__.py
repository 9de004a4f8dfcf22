"""What convolutions and networks cost, see and take, as functions that return values; the command line only prints them."""

from omniconv.analysis.cost import STATUSES, Cost, Counts, Coverage, ModuleCost, Row, cost, flop_formulas
from omniconv.analysis.receptive_field import ReceptiveField, effective_receptive_field, receptive_field, receptive_fields
from omniconv.analysis.untouched import untouched

__all__ = [
    "STATUSES",
    "Cost",
    "Counts",
    "Coverage",
    "ModuleCost",
    "ReceptiveField",
    "Row",
    "cost",
    "effective_receptive_field",
    "flop_formulas",
    "receptive_field",
    "receptive_fields",
    "untouched",
]
