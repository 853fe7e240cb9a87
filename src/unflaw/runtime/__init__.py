"""Exported detectors: writing (`export`, with torch), running (`predictor`, without), verification and timing."""
