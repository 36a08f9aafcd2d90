"""Where a run's records go: lines of JSON, TensorBoard, and the console."""
