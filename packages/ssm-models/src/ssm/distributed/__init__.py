"""Models on several processes: tensor parallelism and context parallelism."""

from ssm.distributed.context import ContextOperators, own_steps
from ssm.distributed.layout import gather_state_dict, shard_state_dict
from ssm.distributed.linear import ColumnParallelLinear, RowParallelLinear

__all__ = [
    "ColumnParallelLinear",
    "ContextOperators",
    "RowParallelLinear",
    "gather_state_dict",
    "own_steps",
    "shard_state_dict",
]
