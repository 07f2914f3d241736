"""Language models as pure functions over a dict of arrays: `decoder.build(config) -> Model`.

The letters at the end of array names, here and everywhere else:

  B batch (rows)       T time (tokens of a row)   S keys of a row (carried ones first)
  D width              F width of the MLP         R width of the recurrence
  N attention heads    H head size                V vocabulary
  E key-value heads    Q query heads of one key-value head
  G gate blocks        I, J in and out of a block K convolution taps
  W window             L layers (stacked)         C chunk       1 a kept axis

`x_BTD` is [batch, time, width]; a number in the suffix (`w_D2F`) is a dimension of that size. A
scalar carries no letters.
"""
