"""The kinds of tokenizers, a file each; what they have in common is in data/tokenizer.py."""
