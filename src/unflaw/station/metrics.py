"""Metrics of a station for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

if TYPE_CHECKING:
    from unflaw.station.detectors import Served
    from unflaw.station.log import Entry


class Metrics:
    """Counters of one station.

    Args:
        working: Function that returns the number of requests in progress or waiting.
        detectors: Detectors by name; their thresholds are read whenever metrics are requested.

    Attributes:
        seconds: Durations of inspections in their thread, by detector.
        answers: HTTP answers by method, path and status.
    """

    def __init__(self, working: Callable[[], int], detectors: Mapping[str, Served]) -> None:
        self._working, self._detectors = working, detectors
        self.registry = CollectorRegistry()
        self._inspections = Counter(
            "unflaw_inspections", "Inspections logged.", ("detector", "category", "verdict"), registry=self.registry
        )
        # a tenth of the p-values of representative good images is below 0.1: a growing share indicates drift
        self._p_values = Histogram(
            "unflaw_p_value",
            "P-values of inspections.",
            ("detector", "category"),
            buckets=(0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0),
            registry=self.registry,
        )
        self.seconds = Histogram(
            "unflaw_inspection_seconds",
            "Decoding and inspecting an image.",
            ("detector",),
            buckets=(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10),
            registry=self.registry,
        )
        self.answers = Counter("unflaw_answers", "HTTP answers.", ("method", "path", "status"), registry=self.registry)
        self.registry.register(self)

    def count(self, entry: Entry) -> None:
        self._inspections.labels(entry.detector, entry.category, entry.verdict).inc()
        self._p_values.labels(entry.detector, entry.category).observe(entry.p_value)

    def collect(self) -> Iterable[Metric]:
        """Yield the metrics whose value is read on request."""
        yield GaugeMetricFamily("unflaw_working", "Requests in progress or waiting.", self._working())
        thresholds = GaugeMetricFamily("unflaw_threshold", "Threshold of scores.", labels=("detector", "category"))
        for served in self._detectors.values():
            for category, calibration in served.detector.calibrations.items():
                thresholds.add_metric((served.name, category), calibration.threshold)
        yield thresholds

    def render(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self.registry)
