"""What a dataset is on disk: manifest, shards, strict tar."""
