"""The bucket that gradients are reduced in: the engine sets it, the cost model counts it."""

from __future__ import annotations

# Numbers of gradients that DeepSpeed sends together at most: its default.
REDUCE_BUCKET = 500_000_000


def reduce_bucket_size(num_parameters: int) -> int:
    """Numbers in the bucket of a model.

    DeepSpeed allocates all of a bucket, so it is never larger than the model.
    """
    return min(REDUCE_BUCKET, num_parameters)
