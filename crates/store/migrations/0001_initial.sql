-- Times are milliseconds since the Unix epoch. States are the service's own words.
-- `seq` orders a list: it never changes and is never reused, so that a page can begin where the last one ended.

CREATE TABLE images (
    seq           INTEGER PRIMARY KEY AUTOINCREMENT,
    id            TEXT    NOT NULL UNIQUE,
    account       TEXT    NOT NULL,
    region        TEXT    NOT NULL,
    name          TEXT    NOT NULL,
    state         TEXT    NOT NULL,
    latest_active INTEGER,
    latest_failed INTEGER,
    tags          TEXT    NOT NULL,
    created_ms    INTEGER NOT NULL,
    updated_ms    INTEGER NOT NULL,
    UNIQUE (account, region, name)
) STRICT;

CREATE TABLE versions (
    seq          INTEGER PRIMARY KEY AUTOINCREMENT,
    image_id     TEXT    NOT NULL REFERENCES images (id) ON DELETE CASCADE,
    number       INTEGER NOT NULL,
    state        TEXT    NOT NULL,
    status       TEXT    NOT NULL,
    state_reason TEXT,
    spec         TEXT    NOT NULL,
    tags         TEXT    NOT NULL,
    created_ms   INTEGER NOT NULL,
    updated_ms   INTEGER NOT NULL,
    UNIQUE (image_id, number)
) STRICT;

CREATE TABLE builds (
    seq                   INTEGER PRIMARY KEY AUTOINCREMENT,
    id                    TEXT    NOT NULL UNIQUE,
    image_id              TEXT    NOT NULL,
    number                INTEGER NOT NULL,
    state                 TEXT    NOT NULL,
    state_reason          TEXT,
    created_ms            INTEGER NOT NULL,
    code_install_bytes    INTEGER,
    disk_snapshot_bytes   INTEGER,
    memory_snapshot_bytes INTEGER,
    FOREIGN KEY (image_id, number) REFERENCES versions (image_id, number) ON DELETE CASCADE
) STRICT;

CREATE INDEX builds_of_version ON builds (image_id, number, seq);

-- A terminated MicroVM outlives its image in the lists, so the image is no foreign key.
CREATE TABLE microvms (
    seq           INTEGER PRIMARY KEY AUTOINCREMENT,
    id            TEXT    NOT NULL UNIQUE,
    account       TEXT    NOT NULL,
    region        TEXT    NOT NULL,
    image_id      TEXT    NOT NULL,
    image_name    TEXT    NOT NULL,
    number        INTEGER NOT NULL,
    state         TEXT    NOT NULL,
    state_reason  TEXT,
    endpoint      TEXT    NOT NULL UNIQUE,
    spec          TEXT    NOT NULL,
    generation    INTEGER NOT NULL,
    started_ms    INTEGER NOT NULL,
    suspended_ms  INTEGER,
    suspended_by  TEXT,
    terminated_ms INTEGER
) STRICT;

CREATE INDEX microvms_of_scope ON microvms (account, region, seq);
CREATE INDEX microvms_of_image ON microvms (image_id, state);
CREATE INDEX microvms_terminated ON microvms (terminated_ms) WHERE terminated_ms IS NOT NULL;

-- An idempotency token lives as long as the resource that it made.
CREATE TABLE client_tokens (
    account     TEXT NOT NULL,
    region      TEXT NOT NULL,
    operation   TEXT NOT NULL,
    token       TEXT NOT NULL,
    fingerprint TEXT NOT NULL,
    resource_id TEXT NOT NULL,
    PRIMARY KEY (account, region, operation, token)
) STRICT, WITHOUT ROWID;

CREATE INDEX client_tokens_of_resource ON client_tokens (resource_id);
