"""The oracle: real frameworks in worker processes, against which conversions are judged by forward pass."""
