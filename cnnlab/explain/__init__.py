"""Maps of what a network's answer rests on, how far they can be trusted, and pictures of them."""

from cnnlab.explain.maps import Map
from cnnlab.explain.methods import METHODS, USUAL, explain
from cnnlab.explain.scores import Score, score_of
from cnnlab.explain.subject import Subject

__all__ = ["METHODS", "USUAL", "Map", "Score", "Subject", "explain", "score_of"]
