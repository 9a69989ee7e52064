"""The machine: which device computes, what it is called, and what it multiplies fast."""
