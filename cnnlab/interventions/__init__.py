"""What may change a run while it trains (`cnnlab.protocols.Intervention`): averages, projections, freezing, noise,
planted faults."""

from cnnlab.interventions.averages import Ema
from cnnlab.interventions.finetuning import Features, Finetune, Full, Gradual, Partial
from cnnlab.interventions.freezing import Freeze
from cnnlab.interventions.noise import GradientNoise
from cnnlab.interventions.planted import PlantedNaN
from cnnlab.interventions.projections import GradientCentralization, MaxNorm

__all__ = [
    "Ema",
    "Features",
    "Finetune",
    "Freeze",
    "Full",
    "GradientCentralization",
    "GradientNoise",
    "Gradual",
    "MaxNorm",
    "Partial",
    "PlantedNaN",
]
