"""From anomaly maps to regions and results."""
