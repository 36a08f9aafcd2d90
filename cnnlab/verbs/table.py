"""The verbs of the command line; each is a module of this package, loaded when it is called."""

VERBS = {
    "train": "compose an experiment from parts and run it (-m sweeps, resume=RUN goes on)",
    "eval": "evaluate a run's checkpoint on one of its splits",
    "predict": "say what a trained network sees in image files, folders and lists",
    "export": "write a trained network as ONNX, torch.export and weights, checked on real samples",
    "explain": "show what a run's network looks at: Grad-CAM, gradients, occlusion",
    "summary": "show a network layer by layer: shapes, parameters, multiply-adds, receptive fields",
    "check": "tell what is wrong with an experiment before it trains",
    "probe": "follow signals through an untrained network, beside theory; name the init that mends it",
    "lr-find": "find the learning rate by a sweep over all rates (optim.lr=auto takes it)",
    "landscape": "measure the loss around the weights: curvature, slope, noise, and what they mean",
    "replay": "run an update that was not finite once more, and name the layer and the samples",
    "bench": "measure how fast an experiment trains, and where its time goes",
    "help": "explain a part and its settings: cnnlab help model=vgg",
}
BUILDERS = ("train", "summary", "check", "probe", "lr-find", "landscape", "bench", "help")
"""Verbs that take overrides, since they build an experiment or explain one; the others read run folders."""
