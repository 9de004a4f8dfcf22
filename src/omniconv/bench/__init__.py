"""Measuring: real pictures and sequences through every technique, verified, counted and timed."""
