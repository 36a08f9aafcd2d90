"""Losses with one value a sample, and the penalties that are added to their mean."""

from cnnlab.losses.base import PerSample
from cnnlab.losses.dice import Dice
from cnnlab.losses.entropy import BCE, CrossEntropy
from cnnlab.losses.focal import Focal
from cnnlab.losses.margin import MSE, Hinge
from cnnlab.losses.weighted import Weighted

__all__ = ["BCE", "MSE", "CrossEntropy", "Dice", "Focal", "Hinge", "PerSample", "Weighted"]
