"""Watches a network while it trains: taps in the network, probes that read them, the observer between."""
