"""What every part builds on: errors and exit codes, provenance, faults on purpose, tensor files."""
