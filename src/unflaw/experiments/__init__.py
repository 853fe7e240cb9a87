"""Grids of runs on data sets: benchmark, ablation, feature store, tables and pages of results."""
