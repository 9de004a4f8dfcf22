"""Changes to networks that exist. Re-exports only; each operation has its own file."""

from omniconv.surgery.dilate import DilationChange, DilationPlan, dilation_plan, stride_to_dilation
from omniconv.surgery.dilate_target import DilatedTarget, dilate_target

__all__ = ["DilatedTarget", "DilationChange", "DilationPlan", "dilate_target", "dilation_plan", "stride_to_dilation"]
