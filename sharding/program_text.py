"""A compiled program, read from its text: computations, their instructions, how often they run.

Arrays are (dtype, shape). Whatever is not parsed here stays as text in `Instruction.rest`.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

Computations = dict[str, dict[str, "Instruction"]]

# "-start": an asynchronous one, as the compiler for GPUs writes it since jax 0.11.
FUSIONS = ("fusion", "fusion-start")
_SHAPE = re.compile(r"\b([a-z]+[0-9]*(?:e[0-9]m[0-9]\w*)?)\[([0-9,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"\s?([a-z][a-z\-]*)\(")
_CALLED = re.compile(
  r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction of a computation."""

  name: str
  shape: str  # as written
  opcode: str
  rest: str  # operands and attributes, as written

  @property
  def operands(self) -> list[str]:
    return re.findall(r"%([\w.\-]+)", self.rest[: _closing(self.rest)])

  @property
  def op_name(self) -> str:
    """The path of JAX's names; "" where there is none."""
    found = re.search(r'op_name="([^"]*)"', self.rest)
    return found[1] if found else ""


def computations_of(text: str) -> tuple[Computations, str]:
  """The instructions of each computation by their names, and the name of the entry."""
  computations: Computations = {}
  current: dict[str, Instruction] = {}
  entry = None
  for line in text.splitlines():
    if header := _COMPUTATION.match(line):
      current = computations.setdefault(header[2], {})
      entry = header[2] if header[1] else entry
    elif match := _INSTRUCTION.match(line):
      current[match[1]] = _instruction(match[1], match[2])
  if entry is None:
    raise ValueError("no ENTRY computation: this is not the text of a compiled program")
  return computations, entry


def _instruction(name: str, written: str) -> Instruction:
  # A tuple's shape holds spaces, comments and parentheses (in layouts) of its own.
  end = _closing(written[1:]) + 2 if written.startswith("(") else 0
  opcode = _OPCODE.search(written, end)
  assert opcode is not None, f"no opcode in {written}"
  return Instruction(name, written[: opcode.start()], opcode[1], written[opcode.end() :])


def _closing(written: str) -> int:
  """Where the parenthesis that was open before `written` closes."""
  depth = 1
  for index, letter in enumerate(written):
    depth += (letter == "(") - (letter == ")")
    if depth == 0:
      return index
  raise ValueError(f"parentheses do not close in {written[:100]!r}")


def fused(computations: Computations) -> set[str]:
  """The computations that are the inside of a fusion: their results are not written to memory."""
  return {
    called
    for instructions in computations.values()
    for instruction in instructions.values()
    if instruction.opcode in FUSIONS
    for called, _ in _calls(instruction, computations)
  }


def times_of(computations: Computations, entry: str) -> dict[str, int | None]:
  """How often each computation runs; None if that depends on data."""
  times: dict[str, int | None] = {entry: 1}
  # Callers come after the computations they call, so one backward pass sees all callers first.
  for name in reversed(list(computations)):
    if name not in times:
      continue
    for instruction in computations[name].values():
      for called, trips in _calls(instruction, computations):
        per_call = times[name]
        calls = None if per_call is None or trips is None else per_call * trips
        before = times.get(called, 0)
        times[called] = None if before is None or calls is None else before + calls
  return times


def _calls(instruction: Instruction, computations: Computations) -> list[tuple[str, int | None]]:
  """The computations that an instruction runs, and how often."""
  # Their computations are those of their start.
  if instruction.opcode in ("async-update", "async-done"):
    return []
  trips: int | None = 1
  if instruction.opcode == "while":
    trips = _trips(instruction, computations)
  called = _CALLED.findall(instruction.rest)
  for branches in _BRANCHES.findall(instruction.rest):
    called += re.findall(r"%?([\w.\-]+)", branches)
  return [(name, trips) for name in called]


def _trips(instruction: Instruction, computations: Computations) -> int | None:
  """The trip count of a while loop: as annotated, or of a condition that is `i < n`.

  Counters start at 0; None for any other condition. Loops of jax.lax.scan count by 1. Those of a
  product whose operand is sent meanwhile count in larger steps, which are read from the body.
  """
  if known := _TRIP_COUNT.search(instruction.rest):
    return int(known[1])
  condition = re.search(r"condition=%?([\w.\-]+)", instruction.rest)
  assert condition is not None, f"no condition in {instruction.rest[:200]}"
  instructions = computations[condition[1]]
  last = list(instructions.values())[-1]
  if last.opcode != "compare" or "direction=LT" not in last.rest:
    return None
  index, bound = (instructions[name] for name in last.operands)
  is_counter = index.opcode == "get-tuple-element" and re.match(r"[su]32\[\]", index.shape)
  end = _constant(bound)
  if not is_counter or end is None:
    return None
  step = _step(index, instruction, computations)
  if step is None and index.shape.startswith("s32"):
    step = 1
  return None if step is None else -(-end // step)


def _step(index: Instruction, loop: Instruction, computations: Computations) -> int | None:
  """How much the body adds to the counter, which is element `index` of the loop's tuple."""
  body = re.search(r"body=%?([\w.\-]+)", loop.rest)
  assert body is not None, f"no body in {loop.rest[:200]}"
  instructions = computations[body[1]]
  position = _element(index)
  new = instructions.get(list(instructions.values())[-1].operands[position])
  if new is None or new.opcode != "add":
    return None
  terms = [instructions[name] for name in new.operands]
  is_counter = [term.opcode == "get-tuple-element" and _element(term) == position for term in terms]
  steps = [_constant(term) for term, counts in zip(terms, is_counter) if not counts]
  return steps[0] if len(steps) == 1 else None


def _element(taken: Instruction) -> int:
  found = re.search(r"index=(\d+)", taken.rest)
  assert found is not None, f"no index in {taken.rest[:200]}"
  return int(found[1])


def _constant(one: Instruction) -> int | None:
  found = re.match(r"(\d+)\)", one.rest) if one.opcode == "constant" else None
  return int(found[1]) if found else None


def arrays_of(shape: str) -> list[tuple[str, tuple[int, ...]]]:
  """The arrays of a shape as written, tuples flattened; layouts and comments are left out."""
  return [
    (dtype, tuple(int(size) for size in sizes.split(",") if size))
    for dtype, sizes in _SHAPE.findall(shape)
  ]


def size_of(arrays: Sequence[tuple[str, tuple[int, ...]]]) -> int:
  """Bytes of all of them, without the padding of a layout."""
  return sum(math.ceil(_bits(dtype) * math.prod(shape) / 8) for dtype, shape in arrays)


def _bits(dtype: str) -> int:
  if dtype in ("pred", "token"):
    return 8 if dtype == "pred" else 0
  bits = re.match(r"(?:bf|f|s|u|c)(\d+)", dtype)
  if bits is None:
    raise ValueError(f"unknown dtype {dtype!r} in a compiled program")
  return int(bits[1])
