"""Memory, traffic and time of a run on a machine, before it runs."""
