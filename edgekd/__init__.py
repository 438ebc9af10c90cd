"""EdgeKD: distil, quantise, measure and explain image classifiers for constrained hardware."""

__version__ = "0.1.0"
