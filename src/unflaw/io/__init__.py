"""Files on disk: atomic writing, the detector file format, progress."""
