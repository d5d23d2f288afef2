"""One step of an optimizer shared by the ranks of an MPI program.

`pip install 'fusedopt[mpi]'` brings mpi4py and an MPI; `mpiexec -n 4 python train.py` starts four
ranks.
"""

from .memory import shared_arrays
from .optimizer import ShardedOptimizer

__all__ = ["ShardedOptimizer", "shared_arrays"]
