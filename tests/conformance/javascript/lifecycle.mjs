// Run, token, fetch, suspend, fetch (which resumes), resume, terminate: with the JavaScript SDK as it is, set up by the environment alone.
// Prints one JSON line: what each step answered.

import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { setTimeout } from "node:timers/promises";

const require = createRequire(`${process.env.HEARTH_TEST_NODE}/`);
const {
  CreateMicrovmAuthTokenCommand,
  GetMicrovmCommand,
  LambdaMicrovmsClient,
  ListMicrovmsCommand,
  ResumeMicrovmCommand,
  RunMicrovmCommand,
  SuspendMicrovmCommand,
  TerminateMicrovmCommand,
  ValidationException,
  paginateListMicrovms,
} = require("@aws-sdk/client-lambda-microvms");

const { IMAGE_ARN, ENDPOINT_PORT } = process.env;
const client = new LambdaMicrovmsClient({ maxAttempts: 1 });

async function until(microvmIdentifier, wanted) {
  const deadline = Date.now() + 45_000;
  for (;;) {
    const { state } = await client.send(new GetMicrovmCommand({ microvmIdentifier }));
    if (state === wanted) return state;
    assert.ok(Date.now() < deadline && state !== "TERMINATED", `it is ${state} instead of ${wanted}`);
    await setTimeout(50);
  }
}

async function page(endpoint, authToken) {
  const response = await fetch(`https://${endpoint}:${ENDPOINT_PORT}/`, { headers: authToken, signal: AbortSignal.timeout(45_000) });
  return { status: response.status, text: await response.text() };
}

const idlePolicy = { maxIdleDurationSeconds: 600, suspendedDurationSeconds: 600, autoResumeEnabled: true };
const { microvmId, endpoint, startedAt } = await client.send(new RunMicrovmCommand({ imageIdentifier: IMAGE_ARN, idlePolicy }));
const microvm = { microvmIdentifier: microvmId };
const said = { microvmId, startedAt: startedAt instanceof Date };
try {
  said.running = await until(microvmId, "RUNNING");
  const { authToken } = await client.send(
    new CreateMicrovmAuthTokenCommand({ ...microvm, expirationInMinutes: 5, allowedPorts: [{ port: 8080 }] }),
  );
  said.first = await page(endpoint, authToken);

  await client.send(new SuspendMicrovmCommand(microvm));
  said.suspended = await until(microvmId, "SUSPENDED");
  said.woken = await page(endpoint, authToken);

  await client.send(new SuspendMicrovmCommand(microvm));
  await until(microvmId, "SUSPENDED");
  await client.send(new ResumeMicrovmCommand(microvm));
  said.resumed = await until(microvmId, "RUNNING");
  said.again = await page(endpoint, authToken);

  const ids = [];
  for await (const { items } of paginateListMicrovms({ client, pageSize: 1 }, { imageIdentifier: IMAGE_ARN })) {
    ids.push(...items.map((item) => item.microvmId));
  }
  const { items } = await client.send(new ListMicrovmsCommand({ imageIdentifier: IMAGE_ARN, maxResults: 50 }));
  said.listed = ids.includes(microvmId) && items.some((item) => item.microvmId === microvmId);
} finally {
  await client.send(new TerminateMicrovmCommand(microvm));
}
try {
  await client.send(new SuspendMicrovmCommand(microvm));
} catch (error) {
  said.refused = { typed: error instanceof ValidationException, name: error.name, message: error.message, status: error.$metadata.httpStatusCode };
}
console.log(JSON.stringify(said));
