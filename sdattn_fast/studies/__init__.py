"""Experiments on the shapes pipeline whose results the documentation reports, each run with `python -m`."""
