"""From files to a dataset: documents, text, clips, video."""
