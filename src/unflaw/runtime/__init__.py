"""Exported detectors: written with torch (`export`), run without it (`predictor`), compared, and timed."""
