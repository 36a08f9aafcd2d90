"""What is learned: the targets, the head, the loss and the metrics of each kind of problem."""
