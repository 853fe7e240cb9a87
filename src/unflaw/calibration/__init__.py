"""From scores of good images to thresholds, p-values, a guarantee on false alarms, and drift."""
