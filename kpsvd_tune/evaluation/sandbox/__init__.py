"""Everything that runs programs a model wrote: the sandbox, the limits, and the judge inside."""
