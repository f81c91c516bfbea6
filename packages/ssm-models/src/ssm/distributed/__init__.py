"""Models on several processes: tensor parallelism and context parallelism."""

from ssm.distributed.context import ContextOperators, copy_parameters, own_steps, sum_gradients
from ssm.distributed.layout import gather_state_dict, shard_state_dict
from ssm.distributed.linear import ColumnParallelLinear, RowParallelLinear

__all__ = [
    "ColumnParallelLinear",
    "ContextOperators",
    "RowParallelLinear",
    "copy_parameters",
    "gather_state_dict",
    "own_steps",
    "shard_state_dict",
    "sum_gradients",
]
