"""Operators on compiled kernels, one module each: tensors on one side, ``ssm_kernels`` on the other.

``ssm.utils.dispatch`` imports a module when its operator is first used; importing one raises
whatever keeps the kernels from loading.
"""
