"""Faces towards other libraries."""
