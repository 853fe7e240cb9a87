"""Version of unflaw."""

__version__ = "0.1.0"
