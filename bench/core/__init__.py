"""Measure the cases: timing and memory, records, tables and verdicts."""
