"""Fixtures of tests that read a small corpus."""

from corpora import corpus, dataset, pristine, tokenizer_path
