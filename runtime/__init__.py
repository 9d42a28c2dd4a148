"""Errors, files, devices, processes, downloads: what every program needs. Imports no model."""
