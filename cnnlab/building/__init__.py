"""From an experiment to a run: parts made for a trial, assembled, wired."""
