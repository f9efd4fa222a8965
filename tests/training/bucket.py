"""Buckets of Google Cloud Storage, as far as checkpoints need them, on this machine's loopback and in memory.

What it answers is of https://cloud.google.com/storage/docs/json_api/v1: buckets.get, and insert (media, multipart,
resumable), get, list, rewrite, move and delete of objects, with generations and conditions on them. gcsfs and Google's
own client find it by STORAGE_EMULATOR_HOST, tensorstore by TENSORSTORE_GCS_HTTP_URL.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import http.server
import itertools
import json
import re
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = 1000  # objects listed at once


@dataclasses.dataclass(frozen=True)
class Blob:
    """What an object holds, and the number of that version of it."""

    data: bytes
    generation: int


class Buckets:
    """All there is, by bucket and name, and how it is reached.

    Attributes:
      url: of the server.
      objects: {(bucket, name): what it holds}.
      refusing: to write anything, as where a key has expired.
    """

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], Blob] = {}
        self.url = ""
        self.refusing = False
        self._lock = threading.Lock()
        self._generations = itertools.count(1)
        self._uploads: dict[str, tuple[str, str, dict[str, str], bytearray]] = {}

    @property
    def environment(self) -> dict[str, str]:
        """With which clients find it."""
        return {"STORAGE_EMULATOR_HOST": self.url, "TENSORSTORE_GCS_HTTP_URL": self.url}

    def about(self, bucket: str, name: str) -> dict[str, Any]:
        """An object as a resource."""
        blob = self.objects[bucket, name]
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "size": str(len(blob.data)),
            "generation": str(blob.generation),
            "metageneration": "1",
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "updated": "2026-01-01T00:00:00.000Z",
            "md5Hash": base64.b64encode(hashlib.md5(blob.data).digest()).decode(),
            "storageClass": "STANDARD",
        }

    def refused(self, bucket: str, name: str, query: dict[str, str]) -> int:
        """The status for conditions on generations that don't hold; 0: they do."""
        blob = self.objects.get((bucket, name))
        now = blob.generation if blob else 0
        if int(query.get("ifGenerationMatch", now)) != now:
            return 412
        return 304 if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == now else 0

    def put(self, bucket: str, name: str, data: bytes, query: dict[str, str]) -> tuple[int, Any]:
        """Writes an object if the conditions hold; (status, resource)."""
        with self._lock:
            if status := 403 if self.refusing else self.refused(bucket, name, query):
                return status, {"error": {"code": status, "message": "refused"}}
            self.objects[bucket, name] = Blob(data, next(self._generations))
            return 200, self.about(bucket, name)

    def copy(self, bucket: str, path: list[str], to: str, new: list[str], query: dict[str, str]) -> tuple[int, Any]:
        """Copies one, whose name is given by its parts, to another bucket and name; as `put`."""
        blob = self.objects.get((bucket, "/".join(path)))
        return (404, {}) if blob is None else self.put(to, "/".join(new), blob.data, query)

    def delete(self, bucket: str, name: str, query: dict[str, str]) -> int:
        """Deletes one; the status."""
        with self._lock:
            if (bucket, name) not in self.objects:
                return 404
            if status := self.refused(bucket, name, query):
                return status
            del self.objects[bucket, name]
            return 204

    def listed(self, bucket: str, query: dict[str, str]) -> dict[str, Any]:
        """A page of names after a prefix, folded at a delimiter."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        items, folded = [], []
        for name in sorted(name for at, name in list(self.objects) if at == bucket and name.startswith(prefix)):
            inside = name[len(prefix) :]
            if name < query.get("startOffset", "") or name >= query.get("endOffset", "\U0010ffff"):
                continue
            if delimiter and delimiter in inside:
                folded.append(prefix + inside.split(delimiter)[0] + delimiter)
            else:
                items.append(name)
        first, size = int(query.get("pageToken", 0)), min(int(query.get("maxResults", PAGE)), PAGE)
        page = {"items": [self.about(bucket, name) for name in items[first : first + size]]}
        page["prefixes"] = sorted(set(folded)) if not first else []
        return page | ({"nextPageToken": str(first + size)} if first + size < len(items) else {})

    def begin(self, bucket: str, name: str, query: dict[str, str]) -> str:
        """Begins a resumable upload; its number."""
        with self._lock:
            number = str(len(self._uploads))
            self._uploads[number] = (bucket, name, query, bytearray())
            return number

    def resume(self, number: str, data: bytes, content_range: str) -> tuple[int, Any]:
        """Takes the next bytes of an upload; (308, bytes so far) or, with the last ones, as `put`."""
        bucket, name, query, so_far = self._uploads[number]
        so_far += data
        total = content_range.rpartition("/")[2]
        if total not in ("", "*") and len(so_far) == int(total):
            return self.put(bucket, name, bytes(so_far), query)
        return 308, len(so_far)


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers for `buckets`."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet an answer: a client waits 40 ms for the second of two
    disable_nagle_algorithm = True
    buckets: Buckets

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def _answer(self, status: int, body: Any = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Type", "application/octet-stream" if isinstance(body, bytes) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _asked(self) -> tuple[list[str], dict[str, str], bytes]:
        """(path by its parts, query, body)."""
        url = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(url.query, keep_blank_values=True).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return [unquote(part) for part in url.path.strip("/").split("/")], query, body

    def do_GET(self) -> None:  # noqa: N802 - the name that http.server asks for
        """buckets.get, objects.list, objects.get."""
        path, query, _ = self._asked()
        bucket, *name = path[path.index("b") + 1 :]
        if not name:
            self._answer(200, {"kind": "storage#bucket", "name": bucket, "id": bucket, "metageneration": "1"})
        elif len(name) == 1:
            self._answer(200, self.buckets.listed(bucket, query))
        elif (key := (bucket, "/".join(name[1:]))) not in self.buckets.objects:
            self._answer(404, {"error": {"code": 404, "message": "no such object"}})
        elif status := self.buckets.refused(*key, query):
            self._answer(status)
        elif query.get("alt") != "media":
            self._answer(200, self.buckets.about(*key))
        else:
            self._send(self.buckets.objects[key])

    def _send(self, blob: Blob) -> None:
        headers = {"x_goog_generation": str(blob.generation), "x_goog_metageneration": "1"}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            self._answer(200, blob.data, **headers)
            return
        size = len(blob.data)
        first = int(wanted[1]) if wanted[1] else max(size - int(wanted[2]), 0)
        last = min(int(wanted[2]), size - 1) if wanted[1] and wanted[2] else size - 1
        if first > last:
            self._answer(416, **headers)
            return
        part = blob.data[first : last + 1]
        self._answer(206, part, Content_Range=f"bytes {first}-{last}/{size}", **headers)

    def do_POST(self) -> None:  # noqa: N802
        """objects.insert, objects.rewrite, objects.move."""
        path, query, body = self._asked()
        bucket, _, *name = path[path.index("b") + 1 :]
        kind = query.get("uploadType")
        if "rewriteTo" in name:  # …/rewriteTo/b/BUCKET/o/NAME
            to = name.index("rewriteTo")
            status, about = self.buckets.copy(bucket, name[:to], name[to + 2], name[to + 4 :], query)
            self._answer(status, {"kind": "storage#rewriteResponse", "done": True, "resource": about})
        elif "moveTo" in name:  # …/moveTo/o/NAME
            to = name.index("moveTo")
            status, about = self.buckets.copy(bucket, name[:to], bucket, name[to + 2 :], query)
            if status == 200:
                self.buckets.delete(bucket, "/".join(name[:to]), {})
            self._answer(status, about)
        elif "upload_id" in query:
            self._resumed(*self.buckets.resume(query["upload_id"], body, self.headers.get("Content-Range", "")))
        elif kind == "media":
            self._answer(*self.buckets.put(bucket, query["name"], body, query))
        elif kind == "multipart":
            boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            about, data = (part.split(b"\n\n", 1)[1] for part in body.split(b"--" + boundary)[1:3])  # as gcsfs has it
            self._answer(*self.buckets.put(bucket, json.loads(about)["name"], data.removesuffix(b"\n"), query))
        else:
            number = self.buckets.begin(bucket, query.get("name") or json.loads(body)["name"], query)
            self._answer(200, Location=f"{self.buckets.url}/upload/storage/v1/b/{bucket}/o?upload_id={number}")

    def _resumed(self, status: int, told: Any) -> None:
        if status == 308:
            self._answer(308, **({"Range": f"bytes=0-{told - 1}"} if told else {}))
        else:
            self._answer(status, told)

    def do_PUT(self) -> None:  # noqa: N802
        """The next bytes of a resumable upload."""
        _, query, body = self._asked()
        self._resumed(*self.buckets.resume(query["upload_id"], body, self.headers.get("Content-Range", "")))

    def do_DELETE(self) -> None:  # noqa: N802
        """objects.delete."""
        path, query, _ = self._asked()
        bucket, _, *name = path[path.index("b") + 1 :]
        self._answer(self.buckets.delete(bucket, "/".join(name), query))


@contextlib.contextmanager
def serve() -> Iterator[Buckets]:
    """Buckets that are reached until the context ends."""
    buckets = Buckets()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"buckets": buckets}))
    server.daemon_threads = True
    buckets.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield buckets
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
