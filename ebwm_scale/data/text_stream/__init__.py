"""Raw text as training data: read, tokenised and packed while training (docs/data.md)."""
