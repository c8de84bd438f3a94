"""One thread a test process: small tensors gain nothing from more, and waiting threads starve whoever shares the cores.

Tests of threading set their own number.
"""

import torch

torch.set_num_threads(1)
