-- The number of the newest version that an image ever had: numbers are not reused.
ALTER TABLE images ADD COLUMN last_number INTEGER NOT NULL DEFAULT 1;

-- A version has its image's tags.
ALTER TABLE versions DROP COLUMN tags;

-- What a MicroVM counts for in its account's memory quota.
ALTER TABLE microvms ADD COLUMN memory_mib INTEGER NOT NULL DEFAULT 0;

UPDATE microvms SET memory_mib = coalesce(
    (SELECT json_extract(versions.spec, '$.memory_mib') FROM versions
     WHERE versions.image_id = microvms.image_id AND versions.number = microvms.number), 0);

CREATE INDEX microvms_live ON microvms (account, region, memory_mib) WHERE state <> 'TERMINATED';

-- Which version of its resource a token made.
ALTER TABLE client_tokens ADD COLUMN number INTEGER NOT NULL DEFAULT 1;

CREATE TABLE connectors (
    seq           INTEGER PRIMARY KEY AUTOINCREMENT,
    id            TEXT    NOT NULL UNIQUE,
    account       TEXT    NOT NULL,
    region        TEXT    NOT NULL,
    name          TEXT    NOT NULL,
    -- The newest version.
    number        INTEGER NOT NULL,
    -- What the last update came to; nothing before the first.
    update_status TEXT,
    update_reason TEXT,
    tags          TEXT    NOT NULL,
    modified_ms   INTEGER NOT NULL,
    UNIQUE (account, region, name)
) STRICT;

CREATE TABLE connector_versions (
    seq          INTEGER PRIMARY KEY AUTOINCREMENT,
    connector_id TEXT    NOT NULL REFERENCES connectors (id) ON DELETE CASCADE,
    number       INTEGER NOT NULL,
    spec         TEXT    NOT NULL,
    created_ms   INTEGER NOT NULL,
    UNIQUE (connector_id, number)
) STRICT;

-- Connectors as their newest versions have them.
CREATE VIEW newest_connectors AS
SELECT connectors.*, connector_versions.spec FROM connectors
JOIN connector_versions ON connector_versions.connector_id = connectors.id AND connector_versions.number = connectors.number;
