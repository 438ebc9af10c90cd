"""The command line: reads options, calls one function of the pipeline, shows the result."""

__all__: list[str] = []  # `edgekd` is its interface; Python's is the package itself
