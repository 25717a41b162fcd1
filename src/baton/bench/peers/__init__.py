"""Other engines on the same weights and prompts, one file each; each is an optional extra, and says so when absent."""

from baton.bench.peers.table import PEERS, Absent, make_peers

__all__ = ["PEERS", "Absent", "make_peers"]
