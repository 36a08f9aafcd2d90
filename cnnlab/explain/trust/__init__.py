"""How far a map can be trusted: randomization, faithfulness, ground truth by intervention, and where it lies; each
beside the same measure of maps that know nothing."""

from cnnlab.explain.trust.report import MEASURES, Known, Measured, Report, Trusted, report

__all__ = ["MEASURES", "Known", "Measured", "Report", "Trusted", "report"]
