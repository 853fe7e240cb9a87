"""Metrics on raw scores, their confidence intervals, and evaluation of a detector on a labelled data set."""
