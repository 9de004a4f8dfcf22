"""Receptive fields: what an output can see (:func:`receptive_field`), and what it reacts to (:func:`effective_receptive_field`)."""

from omniconv.analysis.receptive_field.checkerboard import Overlap, overlap
from omniconv.analysis.receptive_field.effective import Area, EffectiveReceptiveField, effective_receptive_field
from omniconv.analysis.receptive_field.field import coverage, receptive_field, receptive_fields, unevenness
from omniconv.analysis.receptive_field.report import FieldReport, field_report
from omniconv.analysis.receptive_field.result import Part, Phase, ReceptiveField, Window

__all__ = [
    "Area",
    "EffectiveReceptiveField",
    "FieldReport",
    "Overlap",
    "Part",
    "Phase",
    "ReceptiveField",
    "Window",
    "coverage",
    "effective_receptive_field",
    "field_report",
    "overlap",
    "receptive_field",
    "receptive_fields",
    "unevenness",
]
