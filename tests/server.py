"""A server on this machine that speaks the OpenAI protocol, and misbehaves where it is told to."""
import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CANARY = "sk-canary-5f1c"                    # the key, which must be written nowhere


def completion(text, reason="stop"):
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
    reply = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    return json.dumps(reply).encode()


class Server:
    """`reply(request)` gives the answer's text, or (status, bytes) for anything else; `name` is ADDRESS,MODEL."""

    def __init__(self, reply):
        self.reply = reply
        self.requests = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                data = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                data["authorization"] = self.headers["Authorization"]
                server.requests.append(data)
                made = server.reply(data)
                status, body = made if isinstance(made, tuple) else (200, completion(made))
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.send_header("x-should-retry", "false")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.name = f"http://127.0.0.1:{self.http.server_port}/v1,some-model"

    def close(self):
        self.http.shutdown()
        self.http.server_close()


@contextlib.contextmanager
def serving():
    """Starts servers; those of the block end with it."""
    servers = []

    def start(reply):
        servers.append(Server(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
