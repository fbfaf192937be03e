from fastapi import FastAPI, WebSocket
from pydantic import BaseModel

app = FastAPI(title="Orders")
orders: dict[int, "Order"] = {}


class Order(BaseModel):
    item: str
    amount: int


@app.put("/orders/{number}", status_code=201)
async def put(number: int, order: Order):
    orders[number] = order
    return order


@app.get("/orders/{number}")
async def get(number: int) -> Order:
    return orders[number]


@app.websocket("/echo")
async def echo(socket: WebSocket):
    await socket.accept()
    async for text in socket.iter_text():
        await socket.send_text(text.upper())
