"""Checkpoints and model folders: written, read, verified, converted."""
