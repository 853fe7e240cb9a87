"""Heat maps on a fixed scale, captioned panels, and the report of an evaluation as one page."""

from unflaw.report.html import write_report
from unflaw.report.panels import heat_map, outline, overlay, panel, views

__all__ = ["heat_map", "outline", "overlay", "panel", "views", "write_report"]
