"""Array functions with more than one implementation; they import jax and nothing of ours.

Every kernel has a specification in its `__init__.py`, a slow and obvious `reference`, one gradient
for all implementations, and tests that compare every implementation with the reference, values and
every gradient. A Pallas implementation is a file `pallas_*.py` beside the others.
"""
