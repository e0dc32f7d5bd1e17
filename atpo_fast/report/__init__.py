"""The report of a run: one HTML file that needs nothing but a browser."""

from atpo_fast.report.build import build_report

__all__ = ["build_report"]
