"""The only place that touches DeepSpeed's internals."""
