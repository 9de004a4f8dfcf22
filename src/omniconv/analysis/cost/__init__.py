"""What a layer or a network costs: parameters, MACs, flops, bytes and memory, op by op."""

from omniconv.analysis.cost.engine import cost
from omniconv.analysis.cost.flop_counter import flop_formulas
from omniconv.analysis.cost.result import STATUSES, Cost, Counts, Coverage, ModuleCost, Row

__all__ = ["STATUSES", "Cost", "Counts", "Coverage", "ModuleCost", "Row", "cost", "flop_formulas"]
