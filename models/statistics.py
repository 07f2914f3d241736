"""What a layer records (models/observe.py), and how a report shows it.

These are plain values, which a run writes into statistics.jsonl beside the numbers. So a report
draws what any layer recorded from the run's files, without the layer's code.
"""

from typing import Any, Literal, NamedTuple

# For a column with several values for each block: quantiles over channels.
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Column(NamedTuple):
  """A value of a block: one number, or one for each of QUANTILES."""

  name: str
  meaning: str


class Picture(NamedTuple):
  """How columns are drawn, with the axis labelled `unit`.

  lines      a line for each block over training, on a logarithmic axis; of quantiles the median
  shares     the same for the sum of the columns, which are shares of 1, in percent
  quantiles  the last quantiles of each block, and a ring at the median of a second column; `ring`
             says what the ring is

  If a picture of lines is `in_summary`, the report on the console also has a sentence for it, which
  begins with its title.
  """

  title: str
  unit: str
  draw: Literal["lines", "shares", "quantiles"]
  columns: tuple[str, ...]
  ring: str = ""
  in_summary: bool = False


class Statistics(NamedTuple):
  """All that a layer records. `title` is the heading above its pictures, such as "What the
  recurrence does", and `note` explains them."""

  title: str = ""
  note: str = ""
  columns: tuple[Column, ...] = ()
  pictures: tuple[Picture, ...] = ()

  def as_json(self) -> dict[str, Any]:
    return {
      **self._asdict(),
      "columns": [column._asdict() for column in self.columns],
      "pictures": [picture._asdict() for picture in self.pictures],
    }


def of_json(value: dict[str, Any]) -> Statistics:
  """The inverse of `Statistics.as_json`; TypeError for fields that a newer version wrote."""
  return Statistics(
    title=value["title"],
    note=value["note"],
    columns=tuple(Column(**column) for column in value["columns"]),
    pictures=tuple(
      Picture(**{**picture, "columns": tuple(picture["columns"])}) for picture in value["pictures"]
    ),
  )
