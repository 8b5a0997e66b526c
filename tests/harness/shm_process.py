"""A process of its own that owns a segment and, told to on its standard input, writes pages into another's.

Used as `python shm_process.py CLUSTER WORKER`: prints its descriptor (MessagePack, hex), then waits for jobs, one JSON line each:
{"peer": hex, "src": [...], "dst": [...], "imm": 0}; page i of its pool holds bytes i + 1. Ends when its input does.
"""

import json
import sys

import msgspec
import torch

from diptych.kvtransfer.layout import KVLayout
from diptych.kvtransfer.shm import ShmTransport
from diptych.messages.ids import Epoch, Imm, WorkerId
from diptych.messages.membership import MemoryDescriptor

LAYOUT = KVLayout("test", torch.uint8, num_layers=2, num_kv_heads=1, head_dim=64, block_size=16)
NUM_BLOCKS = 48
NUM_PAGES = NUM_BLOCKS * LAYOUT.num_layers


def fill(pool: torch.Tensor) -> None:
    """Every byte of page i becomes i + 1."""
    pool.view(NUM_PAGES, -1)[:] = torch.arange(1, NUM_PAGES + 1, dtype=torch.uint8)[:, None]


def main() -> None:
    cluster, worker = sys.argv[1:]
    transport = ShmTransport(cluster, WorkerId(worker), Epoch(1))
    pool = transport.allocate(LAYOUT, NUM_BLOCKS)
    fill(pool.tensor)
    print(msgspec.msgpack.encode(transport.register(pool)).hex(), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        peer = transport.connect(msgspec.msgpack.decode(bytes.fromhex(job["peer"]), type=MemoryDescriptor))
        transport.write_pages(peer, job["src"], job["dst"], Imm(job["imm"]))
    transport.close()


if __name__ == "__main__":
    main()
