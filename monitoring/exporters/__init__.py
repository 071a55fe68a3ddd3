"""Endpoints from which others fetch the numbers."""
