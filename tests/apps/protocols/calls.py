"""gRPC: one method of each kind, and methods that fail, wait and tell whether a call was cancelled. Messages are bytes."""

import concurrent.futures
import threading

import grpc

cancelled = threading.Event()


def echo(message, context):
    metadata = dict(context.invocation_metadata())
    context.set_trailing_metadata((("seen", metadata.get("client", "")), ("token", str("x-aws-proxy-auth" in metadata))))
    return message


def total(messages, context):
    return str(sum(len(message) for message in messages)).encode()


def count(message, context):
    for number in range(int(message)):
        yield str(number).encode()


def chat(messages, context):
    for message in messages:
        yield b"re: " + message


def fail(message, context):
    context.set_trailing_metadata((("why", "test"),))
    context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not so: " + message.decode())


def wait(message, context):
    cancelled.clear()
    # A call that ends while its answer is under way never comes back here.
    if context.add_callback(cancelled.set):
        yield b"waiting"
        cancelled.wait(60)
    else:
        cancelled.set()


def was_cancelled(message, context):
    return str(cancelled.wait(30)).encode()


METHODS = {
    "echo": grpc.unary_unary_rpc_method_handler(echo),
    "total": grpc.stream_unary_rpc_method_handler(total),
    "count": grpc.unary_stream_rpc_method_handler(count),
    "chat": grpc.stream_stream_rpc_method_handler(chat),
    "fail": grpc.unary_unary_rpc_method_handler(fail),
    "wait": grpc.unary_stream_rpc_method_handler(wait),
    "was_cancelled": grpc.unary_unary_rpc_method_handler(was_cancelled),
}


def serve(port):
    """Whoever drops what this returns ends the server."""
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(8), options=[("grpc.max_receive_message_length", 16 << 20)])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", METHODS),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    return server
