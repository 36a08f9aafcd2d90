"""Between the data and the network: augmentation and input normalization of whole batches, on the device."""

from cnnlab.augment.base import Barrier, Colour, Draws, Fill, Geometric, Part, Placed
from cnnlab.augment.erasing import Cutout, GaussianNoise
from cnnlab.augment.geometric import (
    AlternatingFlip,
    HorizontalFlip,
    PadCrop,
    RandomResizedCrop,
    Rotate,
    Scale,
    Shear,
    Translate,
    VerticalFlip,
)
from cnnlab.augment.mixing import CutMix, Mixup
from cnnlab.augment.normalize import (
    Half,
    Identity,
    Normalize,
    PcaWhitening,
    PerImage,
    Pretrained,
    Standardize,
    ZcaWhitening,
)
from cnnlab.augment.photometric import Brightness, ColourShift, Contrast, Hue, PcaNoise, Saturation
from cnnlab.augment.pipeline import Pipeline
from cnnlab.augment.trivial import TrivialAugment

__all__ = [
    "AlternatingFlip",
    "Barrier",
    "Brightness",
    "Colour",
    "ColourShift",
    "Contrast",
    "CutMix",
    "Cutout",
    "Draws",
    "Fill",
    "GaussianNoise",
    "Geometric",
    "Half",
    "HorizontalFlip",
    "Hue",
    "Identity",
    "Mixup",
    "Normalize",
    "PadCrop",
    "Part",
    "PcaNoise",
    "PcaWhitening",
    "PerImage",
    "Pipeline",
    "Placed",
    "Pretrained",
    "RandomResizedCrop",
    "Rotate",
    "Saturation",
    "Scale",
    "Shear",
    "Standardize",
    "Translate",
    "TrivialAugment",
    "VerticalFlip",
    "ZcaWhitening",
]
