"""From image files to model input: reading, preparing, tiling."""
