"""The ways of running a step."""
