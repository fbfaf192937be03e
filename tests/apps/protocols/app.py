"""An application with a port for each protocol: HTTP/1.1 on 8080, gRPC on 8081, WebSocket on 8082, HTTP/1.1 inside TLS on 8443."""

import http.server
import json
import ssl
import threading

import calls
import sockets

requests = []
gate = threading.Event()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def parse_request(self):
        parsed = super().parse_request()
        requests.append(self.requestline)
        return parsed

    def handle_expect_100(self):
        # Whoever reads the body invites it.
        return True

    def answer(self, body, status=200):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        if self.headers.get("Expect") == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        if self.headers.get("Transfer-Encoding") != "chunked":
            left = int(self.headers.get("Content-Length", 0))
            while left and (piece := self.rfile.read1(min(left, 1 << 20))):
                left -= len(piece)
                yield piece
            return
        while size := int(self.rfile.readline(), 16):
            while size:
                piece = self.rfile.read1(min(size, 1 << 20))
                size -= len(piece)
                yield piece
            self.rfile.readline()
        self.rfile.readline()

    def chunk(self, data):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def do_GET(self):
        path = self.path
        if path == "/tls":
            self.answer(json.dumps(isinstance(self.connection, ssl.SSLSocket)).encode())
        elif path == "/requests":
            self.answer(json.dumps(requests).encode())
        elif path == "/events":
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for number in range(3):
                # The next event is written once somebody who has seen this one says so.
                gate.clear()
                self.chunk(b"data: %d\n\n" % number)
                gate.wait(30)
            self.chunk(b"")
        elif path == "/endless":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            try:
                while True:
                    self.chunk(bytes(1 << 16))
            except OSError:
                gate.set()
        elif path.startswith("/dies/"):
            self.close_connection = True
            self.send_response(200)
            if path == "/dies/chunked":
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.chunk(b"half")
            else:
                self.send_header("Content-Length", "8")
                self.end_headers()
                self.wfile.write(b"half")
        elif path == "/gone":
            self.answer(json.dumps(gate.wait(30)).encode())
        else:
            self.answer(path.encode())

    def do_POST(self):
        if self.path == "/open":
            gate.set()
            self.answer(b"")
        elif self.path == "/shut":
            gate.clear()
            self.answer(b"")
        elif self.path == "/unread":
            gate.wait(60)
            self.close_connection = True
            self.answer(b"enough", 413)
        elif self.path == "/refuse":
            self.close_connection = True
            self.answer(b"no", 413)
        else:
            self.answer(str(sum(map(len, self.body()))).encode())

    do_PUT = do_POST


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 256


def encrypted():
    server = Server(("127.0.0.1", 8443), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain("/app/certificate.pem", "/app/key.pem")
    # The handshake belongs to the connection's own thread: here it would hold up the others.
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    return server


grpc_server = calls.serve(8081)
threading.Thread(target=sockets.serve, args=(8082,), daemon=True).start()
threading.Thread(target=encrypted().serve_forever, daemon=True).start()
# Last: the image is made when its port listens.
Server(("127.0.0.1", 8080), Handler).serve_forever()
