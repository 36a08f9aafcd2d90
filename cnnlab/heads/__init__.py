"""Heads: what reads a backbone's features, beside the network's own classifier or instead of it."""

from cnnlab.heads.classifier import LinearClassifier
from cnnlab.heads.decoders import NearestDecoder, UnpoolDecoder

__all__ = ["LinearClassifier", "NearestDecoder", "UnpoolDecoder"]
