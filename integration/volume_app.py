"""An application on a volume for tests: it keeps lines, flushed one by one, and can fill its volume.

With BEATS in its environment it also notes on its volume, ten times a second, that it is there: `<instance>
<seconds>`. So the volume itself tells who had it when.
"""

from __future__ import annotations

from pathlib import Path

APP = """\
import errno, os, threading, time, uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

LINES = os.environ["DATA"] + "/lines"

def keep(line):
    with open(LINES, "a") as file:
        file.write(line + "\\n")
        file.flush()
        os.fsync(file.fileno())

def fill():
    with open(os.environ["DATA"] + "/fat", "ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(16 << 20))
                os.fsync(file.fileno())
        except OSError as error:
            return errno.errorcode[error.errno]

def grow(mb):
    with open(os.environ["DATA"] + "/fat", "ab", buffering=0) as file:
        for _ in range(mb):
            file.write(os.urandom(1 << 20))
        os.fsync(file.fileno())

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        asked = urlsplit(self.path)
        body = "ok"
        if asked.path == "/keep":
            keep(parse_qs(asked.query)["line"][0])
        elif asked.path == "/fill":
            body = fill()
        elif asked.path == "/grow":
            grow(int(parse_qs(asked.query)["mb"][0]))
        elif asked.path == "/empty":
            os.unlink(os.environ["DATA"] + "/fat")
        elif asked.path == "/lines":
            body = open(LINES).read() if os.path.exists(LINES) else ""
        self.send_response(200)
        self.send_header("Content-Length", str(len(body.encode())))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        pass

def beat():
    me = uuid.uuid4().hex
    while True:
        with open(os.environ["DATA"] + "/beats", "a") as file:
            file.write(f"{me} {time.time():.3f}\\n")
        time.sleep(0.1)

if os.environ.get("BEATS"):
    threading.Thread(target=beat, daemon=True).start()
ThreadingHTTPServer((os.environ["FLY_PRIVATE_IP"], int(os.environ["PORT"])), Handler).serve_forever()
"""

TOML = """\
app = "{app}"
primary_region = "{region}"
[processes]
  app = "python -u app.py"
[env]
  DATA = "/data"
[mounts]
  source = "data"
  destination = "/data"
  initial_size = "1gb"
[http_service]
  internal_port = 8000
  processes = ["app"]
  [[http_service.checks]]
    path = "/"
    interval = "1s"
    timeout = "1s"
    grace_period = "5s"
[[vm]]
  memory = "128mb"
"""


def volume_app(folder: Path, app: str, region: str) -> Path:
    """Write the application; the folder."""
    (folder / "app.py").write_text(APP)
    (folder / "fly.toml").write_text(TOML.format(app=app, region=region))
    return folder
