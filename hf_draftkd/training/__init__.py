"""Distil."""
