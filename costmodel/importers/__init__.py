"""What other tools measured, read into the types of a cluster file.

    nccl_tests   output of nccl-tests (and rccl-tests) → curves of collectives
    topology     output of `nvidia-smi topo -m` → the levels inside a node
    mpigraph     output of mpiGraph → bandwidth between all pairs of nodes
    pairwise     a matrix of bandwidths as CSV → the same
    ring_order   how much of a matrix is the order of measuring
    symmetry     several noisy matrices → one, with its noise floor

Each takes text and returns typed data; `Cluster.with_curves` and `Cluster.with_pairs` take it in.
A text that is not of the format raises InvalidInput with the line and what was expected.
"""

from .mpigraph import mpigraph
from .nccl_tests import ImportedCurves, nccl_tests
from .pairwise import pairwise
from .symmetry import MeasuredPairs, standing_out, symmetrised
from .topology import Topology, node_levels, topology

__all__ = [
    "ImportedCurves",
    "MeasuredPairs",
    "Topology",
    "mpigraph",
    "nccl_tests",
    "node_levels",
    "pairwise",
    "standing_out",
    "symmetrised",
    "topology",
]
