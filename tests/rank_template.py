"""What each forked rank would do again otherwise: the process that is forked imports this."""

import gc
import warnings

import torch
import torch._dynamo  # by DistributedDataParallel; it takes as long as torch itself

from gpt2.cli import train
from gpt2.distributed import device
from gpt2.train import trainer  # noqa: F401

train.parse_train(["--preset", "demo"])  # tyro keeps what it has read of the options
device.measured_flops(torch.device("cpu"), torch.float32)
warnings.simplefilter("error", FutureWarning)  # as pytest does for itself
gc.freeze()  # ranks collect garbage, which would go through all modules
