"""From the command line to a checked experiment's values: composing, binding to signatures, making parts."""
