"""The verbs of the command line; each is a module of this package, loaded when it is called."""

VERBS = {
    "train": "compose an experiment from parts and run it (-m sweeps, resume=RUN goes on)",
    "eval": "evaluate a run's checkpoint on one of its splits",
    "summary": "show a network layer by layer: shapes, parameters, multiply-adds, receptive fields",
    "lr-find": "find the learning rate by a sweep over all rates (optim.lr=auto takes it)",
    "bench": "measure how fast an experiment trains, and where its time goes",
}
BUILDERS = ("train", "summary", "lr-find", "bench")
"""Verbs that build an experiment and so take overrides; the others read run folders."""
