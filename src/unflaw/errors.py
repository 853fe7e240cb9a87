"""What can go wrong with detectors; the messages say why and what to do. `images.ImageError` is of single pictures."""


class DetectorError(ValueError):
    """A detector file that cannot be used, or a detector that is not fitted."""


class TrainingError(ValueError):
    """Data or settings that cannot give, calibrate or measure a detector."""
