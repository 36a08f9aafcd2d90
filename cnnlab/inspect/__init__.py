"""What can be told of a network without training it."""
