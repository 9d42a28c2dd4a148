"""Errors, files, devices, processes, downloads: what every program needs. Knows no model."""
