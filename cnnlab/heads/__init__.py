"""Heads: what reads a backbone's features, beside the network's own classifier or instead of it."""

from cnnlab.heads.boxes import BoxHead, PointsHead
from cnnlab.heads.classifier import LinearClassifier
from cnnlab.heads.decoders import (
    BilinearDecoder,
    FullyConvolutional,
    NearestDecoder,
    TransposedDecoder,
    UNetDecoder,
    UnpoolDecoder,
)

__all__ = [
    "BilinearDecoder",
    "BoxHead",
    "FullyConvolutional",
    "LinearClassifier",
    "NearestDecoder",
    "PointsHead",
    "TransposedDecoder",
    "UNetDecoder",
    "UnpoolDecoder",
]
