"""A WebSocket that echoes, closes when asked to, and remembers how the last one was closed."""

import asyncio

import websockets

last = asyncio.Queue()


async def talk(socket, path):
    if path == "/last":
        await socket.send(str(await last.get()))
        return
    try:
        async for message in socket:
            if message == "close":
                await socket.close(4001, "as you wish")
            elif message == "ping":
                await (await socket.ping(b"app"))
                await socket.send("pong")
            else:
                await socket.send(message)
    except websockets.ConnectionClosed:
        pass
    if path == "/noted":
        await last.put([socket.close_code, socket.close_reason])


async def main(port):
    async with websockets.serve(talk, "127.0.0.1", port, subprotocols=["second", "first"], max_size=4 << 20):
        await asyncio.Future()


def serve(port):
    asyncio.run(main(port))
