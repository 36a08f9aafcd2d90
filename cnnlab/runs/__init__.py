"""The run folder: what a run leaves behind, and its readers."""
