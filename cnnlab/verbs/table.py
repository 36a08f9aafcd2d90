"""The verbs of the command line; each is a module of this package, loaded when it is called."""

VERBS = {
    "train": "compose an experiment from parts and run it (-m sweeps, resume=RUN goes on)",
    "eval": "evaluate a run's checkpoint on one of its splits",
    "summary": "show a network layer by layer: shapes, parameters, multiply-adds, receptive fields",
    "bench": "measure how fast an experiment trains, and where its time goes",
}
BUILDERS = ("train", "summary", "bench")
"""Verbs that build an experiment and so take overrides; the others read run folders."""
