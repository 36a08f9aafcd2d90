"""Where weights come from that were trained before (`weights=...`): runs, files, torchvision, timm."""

from cnnlab.weights.base import Trained, Weights
from cnnlab.weights.file import FileWeights
from cnnlab.weights.published import TimmWeights, TorchvisionWeights
from cnnlab.weights.run import RunWeights

__all__ = ["FileWeights", "RunWeights", "TimmWeights", "TorchvisionWeights", "Trained", "Weights"]
