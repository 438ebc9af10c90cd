"""EdgeKD: distil, quantise, measure and explain image classifiers for constrained hardware."""

import os

# Read when numpy is first imported. OpenBLAS's threads wait for the next product by spinning, on
# the cores that the runtime wants: between numpy's masks a ResNet-18 took 1.8 times as long. What
# is multiplied here is small. Whoever wants more sets it before.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Read when onnxruntime is first imported: its wheel reports to its maker unless told not to.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
