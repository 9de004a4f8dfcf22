"""Changes to networks that exist. Re-exports only; each operation has its own file."""

from omniconv.surgery.dilate import DilationChange, DilationPlan, dilation_plan, stride_to_dilation

__all__ = ["DilationChange", "DilationPlan", "dilation_plan", "stride_to_dilation"]
