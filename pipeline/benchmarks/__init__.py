"""Measurements against a baseline in the same run; `pipeline.bench` is the command."""
