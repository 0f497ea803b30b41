"""Worlds: episodes of frames, actions and rewards, recorded or imported, as a dataset of clips."""
