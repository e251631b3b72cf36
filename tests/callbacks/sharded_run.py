"""Trains a network of which every rank holds a part, by FSDP2; run by torchrun from test_distributed.py."""

import ast
import sys

import torch
from helpers import OPTIMIZERS, Classifier, Keep, Slices, trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from lit_lipschitz import LipschitzLR


class Sharded(Classifier):
    """Each linear layer is a unit of its own, and what is left another."""

    def configure_model(self):
        if not hasattr(self.net[2].weight, "full_tensor"):
            mesh = self.device_mesh["data_parallel"]
            for part in (self.net[0], self.net[2], self.net):
                fully_shard(part, mesh=mesh)


if __name__ == "__main__":
    torch.manual_seed(1)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    module = Sharded(OPTIMIZERS[sys.argv[2]])
    callback = LipschitzLR(**ast.literal_eval(sys.argv[1]))
    trainer(callback, Keep(), devices=2, strategy=strategy).fit(module, datamodule=Slices(8))
