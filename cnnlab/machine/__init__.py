"""The device that a run is placed on, and the processes that share it."""
