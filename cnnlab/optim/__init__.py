"""Optimizers that torch lacks, learning-rate schedules and parameter groups."""

from cnnlab.optim.groups import freeze_parameters, parameter_groups
from cnnlab.optim.muon import Muon
from cnnlab.optim.newton_cg import NewtonCG
from cnnlab.optim.rmsprop import RMSPropInside
from cnnlab.optim.traits import Traits

__all__ = ["Muon", "NewtonCG", "RMSPropInside", "Traits", "freeze_parameters", "parameter_groups"]
