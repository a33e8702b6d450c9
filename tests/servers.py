"Small HTTP servers that misbehave on command."
import contextlib
import hashlib
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Site:
    "A server of one file, and how it behaves. `steps`: one dictionary for each answer; the last one stays."
    def __init__(self, data=None, **behavior):
        self.data = random.Random(7).randbytes(600_000) if data is None else data
        self.etag = '"v1"'
        self.date = None
        self.steps = [behavior]
        self.asked = []
        self.paths = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            def log_message(self, *args): pass
            def do_GET(self):
                with contextlib.suppress(BrokenPipeError, ConnectionResetError): site.answer(self)
                self.close_connection = True
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(.02,), daemon=True).start()
        self.base = f"http://127.0.0.1:{self.server.server_port}"
        self.url = f"{self.base}/w.pth"

    def answer(self, h):
        do = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        asked = h.headers.get("Range")
        same = h.headers.get("If-Range")
        begin = int(asked[6:-1]) if asked else 0
        self.asked.append(begin)
        self.paths.append(h.path)
        if "then" in do: do["then"](self)
        if "location" in do:
            h.send_response(302)
            h.send_header("Location", do["location"])
            h.send_header("Content-Length", "0")
            return h.end_headers()
        if "status" in do:
            h.send_response(do["status"])
            for k, v in do.get("headers", {}).items(): h.send_header(k, v)
            body = do.get("body", b"no")
            h.send_header("Content-Length", str(len(body)))
            h.end_headers()
            return h.wfile.write(body)
        honest = do.get("ranges", True) and begin and (same in (self.etag, self.date) or do.get("ignores_if_range"))
        if honest and begin >= len(self.data):
            h.send_response(416)
            h.send_header("Content-Range", f"bytes */{len(self.data)}")
            h.send_header("Content-Length", "0")
            return h.end_headers()
        begin = begin if honest else 0
        body = do.get("body", self.data)[begin:]
        h.send_response(206 if honest else 200)
        if honest:
            h.send_header("Content-Range",
                          do.get("content_range") or f"bytes {begin}-{len(self.data) - 1}/{len(self.data)}")
        if self.etag: h.send_header("ETag", self.etag)
        if self.date: h.send_header("Last-Modified", self.date)
        if "type" in do: h.send_header("Content-Type", do["type"])
        if do.get("chunked"): h.send_header("Transfer-Encoding", "chunked")
        elif do.get("length", True) is not False: h.send_header("Content-Length", str(do.get("length", len(body))))
        h.end_headers()
        body = body[:do.get("cut", len(body))]
        for i in range(0, len(body), 20_000):
            piece = body[i:i + 20_000]
            h.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if do.get("chunked") else piece)
            if "gate" in do and i + 40_000 > do["at"]: do["gate"].wait(30)
        if do.get("chunked") and "cut" not in do: h.wfile.write(b"0\r\n\r\n")
        if "stall" in do: time.sleep(do["stall"])

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class HubSite(Site):
    """The Hugging Face hub, as far as a download needs it: a HEAD tells size, hash and commit, a GET brings the bytes.

    `files` are by `owner/name/file`; `refusals` map `owner/name` to (status, error code of the hub).
    """
    commit = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, files):
        super().__init__(b"")
        self.files = files
        self.hashes = {path: hashlib.sha256(data).hexdigest() for path, data in files.items()}
        self.refusals = {}
        self.heads = []
        self.tokens = []
        site = self
        def do_head(handler):
            with contextlib.suppress(BrokenPipeError, ConnectionResetError): site.head(handler)
            handler.close_connection = True
        self.server.RequestHandlerClass.do_HEAD = do_head

    def file_of(self, h):
        owner, name, _, revision, file = h.path.strip("/").split("/", 4)
        assert revision in ("main", self.commit), h.path
        return f"{owner}/{name}/{file}"

    def refuse(self, h, status, code):
        h.send_response(status)
        if code: h.send_header("X-Error-Code", code)
        if code == "EntryNotFound": h.send_header("X-Repo-Commit", self.commit)
        h.send_header("Content-Length", "0")
        h.end_headers()

    def allowed(self, h):
        path = self.file_of(h)
        self.tokens.append(h.headers.get("Authorization"))
        repository = path.rsplit("/", 1)[0]
        if repository in self.refusals: self.refuse(h, *self.refusals[repository])
        elif not any(p.startswith(repository + "/") for p in self.files): self.refuse(h, 401, "RepoNotFound")
        elif path not in self.files: self.refuse(h, 404, "EntryNotFound")
        else: return path
        return None

    def head(self, h):
        self.heads.append(h.path)
        path = self.allowed(h)
        if path is None: return
        h.send_response(200)
        h.send_header("X-Repo-Commit", self.commit)
        h.send_header("ETag", f'"{self.hashes[path]}"')
        h.send_header("Content-Length", str(len(self.files[path])))
        h.end_headers()

    def answer(self, h):
        path = self.allowed(h)
        if path is None: return
        self.data = self.files[path]
        self.etag = None # the library asks for a range without If-Range
        super().answer(h)
