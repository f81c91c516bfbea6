"""The commands of ``ssm-models``, a file each: ``add`` declares the options, ``run`` does it."""
