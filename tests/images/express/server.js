const express = require("express");

const app = express();
const carts = new Map();

app.use(express.json());
app.get("/", (request, response) => response.send("shop"));
app.post("/carts/:id", (request, response) => {
  const cart = carts.get(request.params.id) ?? [];
  cart.push(request.body);
  carts.set(request.params.id, cart);
  response.status(201).json(cart);
});
app.get("/carts/:id", (request, response) => response.json(carts.get(request.params.id) ?? []));

app.listen(3000, "0.0.0.0", () => console.log("listening on 3000"));
