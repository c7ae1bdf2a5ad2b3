"""A web server for tests, on loopback.

usage: http_server.py plain|tls FOLDER

Prints its port. Writes each request as a line of JSON to FOLDER/received, before it answers. Answers
/status/N with N, /redirect with a redirection to /ok, /slow after 5 s, and everything else with 200. Ends when
its standard input ends.
"""
import http.server
import json
import ssl
import sys
import threading
import time

MODE, FOLDER = sys.argv[1:3]


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = {
            "method": self.command,
            "path": self.path,
            "headers": {name.lower(): value for name, value in self.headers.items()},
            "body": body.decode("utf-8", "replace"),
        }
        with open(FOLDER + "/received", "a") as received:
            received.write(json.dumps(request) + "\n")
        status = 200
        if self.path.startswith("/status/"):
            status = int(self.path.split("/")[2].split("?")[0])
        elif self.path == "/redirect":
            status = 302
        elif self.path == "/slow":
            time.sleep(5)
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/ok")
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"OK")

    do_GET = do_POST

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
if MODE == "tls":
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(FOLDER + "/cert.pem", FOLDER + "/key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
threading.Thread(target=server.serve_forever, daemon=True).start()
print(server.server_address[1], flush=True)
sys.stdin.read()
