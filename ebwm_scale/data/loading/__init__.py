"""From a dataset to batches: order, mixture, streaming, quarantine."""
