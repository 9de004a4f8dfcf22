"""Plots of what the instruments count and measure, as PNG or SVG. Need the extra ``plot``."""
