"""Google Cloud Storage's JSON API on this machine: objects in memory, as TensorStore asks for them.

Its URL goes into TENSORSTORE_GCS_HTTP_URL. Objects appear whole or not at all and listings are
consistent, as in the real one.
"""

import contextlib
import http.server
import json
import threading
import time
import urllib.parse
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def serving() -> Iterator["Server"]:
  """A server that this process, and those that it starts within, take for Google's."""
  with pytest.MonkeyPatch.context() as patch:
    server = Server()
    patch.setenv("TENSORSTORE_GCS_HTTP_URL", server.url)
    patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
    yield server
    server.shutdown()
    server.server_close()


class Server(http.server.ThreadingHTTPServer):
  """`objects`: (bucket, name) -> (content, generation). `refuse`: it makes names read-only.
  `lose`: the next write of such a name is done, and its answer is lost."""

  daemon_threads = True
  request_queue_size = 128

  def __init__(self):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.objects: dict[tuple[str, str], tuple[bytes, int]] = {}
    self.lock = threading.Lock()
    self.refuse: str | None = None
    self.lose: str | None = None
    self.url = f"http://127.0.0.1:{self.server_address[1]}"
    threading.Thread(target=self.serve_forever, daemon=True).start()

  def names(self, prefix: str = "") -> list[str]:
    """The names of all objects that start like this."""
    with self.lock:
      return sorted(name for _, name in self.objects if name.startswith(prefix))


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  server: Server

  def do_GET(self) -> None:
    bucket, name, query = self._parse()
    if name is None:
      self._list(bucket, query)
      return
    found = self.server.objects.get((bucket, name))
    if found is None:
      self._answer(404)
      return
    content, generation = found
    if query.get("ifGenerationNotMatch") == str(generation):
      self._answer(304)
    elif query.get("ifGenerationMatch", str(generation)) != str(generation):
      self._answer(412)
    elif "Range" in self.headers:
      first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
      start = int(first) if first else len(content) - int(last)
      stop = min(int(last) + 1, len(content)) if first and last else len(content)
      headers = {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
      self._answer(206, content[start:stop], generation, headers)
    else:
      self._answer(200, content, generation)

  def do_POST(self) -> None:
    bucket, _, query = self._parse()
    content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
    name = query["name"]
    if self._is_refused(name):
      return
    with self.server.lock:
      if not self._is_of_generation(bucket, name, query):
        self._answer(412)
        return
      generation = time.time_ns()
      self.server.objects[bucket, name] = (content, generation)
      is_lost = self.server.lose is not None and self.server.lose in name
      if is_lost:
        self.server.lose = None
    if is_lost:
      self._answer(503)  # as what stands between says it
      return
    body = {"name": name, "bucket": bucket, "generation": str(generation), "size": len(content)}
    self._answer(200, json.dumps(body).encode(), generation)

  def do_DELETE(self) -> None:
    bucket, name, query = self._parse()
    assert name is not None
    if self._is_refused(name):
      return
    with self.server.lock:
      if not self._is_of_generation(bucket, name, query):
        self._answer(412)
        return
      was_there = self.server.objects.pop((bucket, name), None) is not None
    self._answer(204 if was_there else 404)

  def _is_of_generation(self, bucket: str, name: str, query: dict[str, str]) -> bool:
    """Whether the object is still the one that the request is for, if it says so."""
    now = str(self.server.objects.get((bucket, name), (b"", 0))[1])
    return query.get("ifGenerationMatch", now) == now

  def _list(self, bucket: str, query: dict[str, str]) -> None:
    with self.server.lock:
      items = [
        {"name": name, "generation": str(generation), "size": str(len(content))}
        for (where, name), (content, generation) in sorted(self.server.objects.items())
        if where == bucket
        and name.startswith(query.get("prefix", ""))
        and name >= query.get("startOffset", "")
        and ("endOffset" not in query or name < query["endOffset"])
      ]
    self._answer(200, json.dumps({"kind": "storage#objects", "items": items}).encode())

  def _parse(self) -> tuple[str, str | None, dict[str, str]]:
    parts = urllib.parse.urlsplit(self.path)
    words = parts.path.split("/b/", 1)[1].split("/")  # BUCKET/o/NAME, the name escaped
    name = urllib.parse.unquote(words[2]) if len(words) > 2 and words[2] else None
    return words[0], name, dict(urllib.parse.parse_qsl(parts.query))

  def _is_refused(self, name: str) -> bool:
    if self.server.refuse is None or self.server.refuse not in name:
      return False
    self._answer(403, b'{"error": {"message": "no storage.objects.create access"}}')
    return True

  def _answer(
    self,
    status: int,
    content: bytes = b"",
    generation: int | None = None,
    headers: dict[str, str] | None = None,
  ) -> None:
    self.send_response(status)
    if generation is not None:
      self.send_header("x-goog-generation", str(generation))
    for key, value in (headers or {}).items():
      self.send_header(key, value)
    self.send_header("Content-Length", str(len(content)))
    self.end_headers()
    self.wfile.write(content)

  def log_message(self, *_: object) -> None:
    """Says nothing: what matters is in what tests find."""
