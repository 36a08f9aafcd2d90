"""What is learned: the targets, the losses, the metrics and the pictures of each kind of problem."""

from cnnlab.tasks.base import Task

__all__ = ["Task"]
