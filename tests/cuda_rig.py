"""Where the CUDA kernels run in tests: on the CUDA device of this machine, or else on the CPU, in Triton's interpreter.

Tests import this before anything of `baton.engine.cuda`: Triton decides while a kernel is defined, for the whole process.
"""

import os

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
