"""From good images to a trained network."""
