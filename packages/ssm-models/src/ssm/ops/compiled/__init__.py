"""Operators on compiled kernels, one module each: torch on one side, ``ssm_kernels`` on the other.

``ssm.utils.dispatch`` imports a module when its operator is first used; importing one raises
whatever keeps the kernels from loading. Each imports the functions that it calls by name, so that
other or older kernels, which lack one, do not load.
"""
