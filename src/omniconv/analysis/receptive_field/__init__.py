"""Receptive fields: what an output can see (:func:`receptive_field`)."""

from omniconv.analysis.receptive_field.field import coverage, receptive_field, unevenness
from omniconv.analysis.receptive_field.result import Part, Phase, ReceptiveField, Window

__all__ = ["Part", "Phase", "ReceptiveField", "Window", "coverage", "receptive_field", "unevenness"]
