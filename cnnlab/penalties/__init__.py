"""Terms of the loss that depend on the weights alone (`cnnlab.protocols.Penalty`): norms, and how units stand to each
other."""

from cnnlab.penalties.norms import L1, L2, GroupLasso
from cnnlab.penalties.orthogonality import Orthogonality

__all__ = ["L1", "L2", "GroupLasso", "Orthogonality"]
