"""Does on request what an app does with its identity: asks the metadata service, and uses AWS's SDK."""

import http.client
import os
import socket
import urllib.parse

import boto3
import botocore.config
import botocore.exceptions
from flask import Flask, request

app = Flask(__name__)
print("the app has started", flush=True)


@app.post("/ask")
def ask():
    """Sends a request and tells the answer."""
    wanted = request.get_json()
    url = urllib.parse.urlsplit(wanted["url"])
    connection = http.client.HTTPConnection(url.hostname, url.port or 80, timeout=30)
    try:
        connection.request(wanted.get("method", "GET"), url.path, headers=wanted.get("headers", {}))
        answer = connection.getresponse()
        return {"status": answer.status, "headers": dict(answer.headers), "body": answer.read().decode()}
    except OSError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        connection.close()


@app.post("/sdk")
def sdk():
    """One call of an SDK that was told nothing: endpoint and credentials are the environment's. (boto3 does not read AWS_REGION by itself.)"""
    wanted = request.get_json()
    config = botocore.config.Config(retries={"total_max_attempts": 1}, connect_timeout=10, read_timeout=30)
    try:
        client = boto3.session.Session(region_name=os.environ["AWS_REGION"]).client(wanted["service"], config=config)
        answer = getattr(client, wanted["call"])(**wanted.get("parameters", {}))
        answer.pop("ResponseMetadata")
        return app.json.dumps(answer, default=str)
    except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
        return {"error": f"{type(error).__name__}: {error}"}


@app.get("/environment")
def environment():
    return dict(os.environ)


@app.get("/hold-port-80")
def hold_port_80():
    """Whether port 80 of every address is the app's to have."""
    with socket.create_server(("0.0.0.0", 80)):
        return "held"
