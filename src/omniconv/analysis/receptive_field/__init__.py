"""Receptive fields: what an output can see (:func:`receptive_field`), and what it reacts to (:func:`effective_receptive_field`)."""

from omniconv.analysis.receptive_field.effective import Area, EffectiveReceptiveField, effective_receptive_field
from omniconv.analysis.receptive_field.field import coverage, receptive_field, unevenness
from omniconv.analysis.receptive_field.result import Part, Phase, ReceptiveField, Window

__all__ = [
    "Area",
    "EffectiveReceptiveField",
    "Part",
    "Phase",
    "ReceptiveField",
    "Window",
    "coverage",
    "effective_receptive_field",
    "receptive_field",
    "unevenness",
]
