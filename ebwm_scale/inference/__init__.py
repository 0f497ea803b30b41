"""Predictions of a trained model: thinking, continuing, scoring; nothing is trained here."""
