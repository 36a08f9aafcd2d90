"""How well a trained network does on data, beyond one number: intervals, calibration, failures, robustness."""
