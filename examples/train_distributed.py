"""Elastic training in several processes, with DistributedDataParallel or, with --fsdp, sharded by FSDP2.

    torchrun --standalone --nproc-per-node 2 examples/train_distributed.py --fsdp -o model.safetensors

Every process takes its slice of the data; ``train`` does the rest. Rank 0 alone prints and writes.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import t3c_compile as t3c
from t3c_compile.passes.elastic import elastic_layers


def batches(rank: int, processes: int) -> list[tuple[Tensor, Tensor]]:
    """This process's rows of 20 batches of 32: points labelled by a random linear rule."""
    generator = torch.Generator().manual_seed(0)
    rule = torch.randn(32, 4, generator=generator)
    xs = torch.randn(20, 32, 32, generator=generator)
    return [(x[rank::processes], (x @ rule).argmax(1)[rank::processes]) for x in xs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fsdp", action="store_true", help="shard the model instead of copying it")
    parser.add_argument("-o", "--output", type=Path, required=True, help="t3c checkpoint to write")
    arguments = parser.parse_args()

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)  # the same model in every process
    model = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 4))
    example = (torch.randn(8, 32),)
    elastic = t3c.transform(model, example)
    if arguments.fsdp:
        for _, layer in elastic_layers(elastic):
            fully_shard(layer)
        fully_shard(elastic)

    result = t3c.train(elastic, batches(rank, dist.get_world_size()), epochs=3)
    if rank == 0:
        for epoch, terms in enumerate(result.history):
            print(f"epoch {epoch}: " + ", ".join(f"{name} {value:.4f}" for name, value in terms.items()))
    # Of a sharded model every process gives its part; rank 0 writes.
    t3c.Checkpoint(elastic, example, result.controller).save(arguments.output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
