"""Measuring: time and memory of calls, and paired comparisons."""
