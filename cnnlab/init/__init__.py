"""Initialization: `init(model, seed)` fills a network's parameters, each from its own random stream."""

from cnnlab.init.base import Initializer
from cnnlab.init.data_driven import LSUV
from cnnlab.init.papers import Own, PaperAlexNet, PaperSpeedNet, PaperVgg
from cnnlab.init.schemes import (
    Constant,
    Default,
    Delta,
    He,
    LeCun,
    Normal,
    Orthogonal,
    TruncatedNormal,
    Xavier,
    Zeros,
)
from cnnlab.init.whitening import Whitening

__all__ = [
    "LSUV",
    "Constant",
    "Default",
    "Delta",
    "He",
    "Initializer",
    "LeCun",
    "Normal",
    "Orthogonal",
    "Own",
    "PaperAlexNet",
    "PaperSpeedNet",
    "PaperVgg",
    "TruncatedNormal",
    "Whitening",
    "Xavier",
    "Zeros",
]
