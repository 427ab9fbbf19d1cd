"""Migrations of the catalogue's schema. `PRAGMA user_version` counts those that a database has had."""

MIGRATIONS = (
    """
    CREATE TABLE speculators (
        name TEXT PRIMARY KEY,
        target_fingerprint TEXT,
        draft_vocabulary_fingerprint TEXT,
        policy BLOB NOT NULL DEFAULT x'',
        pinned INTEGER,
        pin_reason TEXT NOT NULL DEFAULT '',
        is_paused INTEGER NOT NULL DEFAULT 0,
        pause_reason TEXT NOT NULL DEFAULT ''
    ) STRICT;
    CREATE TABLE versions (
        speculator TEXT NOT NULL REFERENCES speculators (name),
        number INTEGER NOT NULL CHECK (number > 0),
        digest TEXT NOT NULL,
        tensors_digest TEXT NOT NULL,
        manifest BLOB NOT NULL,
        phase TEXT NOT NULL,
        reason TEXT NOT NULL,
        published_ms INTEGER NOT NULL,
        since_ms INTEGER NOT NULL,
        is_proven INTEGER NOT NULL,
        is_retained INTEGER NOT NULL,
        is_kept INTEGER NOT NULL DEFAULT 1,
        PRIMARY KEY (speculator, number)
    ) STRICT;
    CREATE UNIQUE INDEX one_version_per_content ON versions (speculator, tensors_digest);
    CREATE UNIQUE INDEX one_stable ON versions (speculator) WHERE phase = 'Stable';
    CREATE INDEX kept ON versions (digest) WHERE is_kept;
    CREATE TABLE transitions (
        id INTEGER PRIMARY KEY,
        speculator TEXT NOT NULL REFERENCES speculators (name),
        number INTEGER NOT NULL,
        before TEXT,
        after TEXT,
        reason TEXT NOT NULL,
        actor TEXT NOT NULL,
        at_ms INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX transitions_by_speculator ON transitions (speculator, id);
    """,
    """
    CREATE TABLE due (
        speculator TEXT NOT NULL REFERENCES speculators (name),
        number INTEGER NOT NULL,
        PRIMARY KEY (speculator, number)
    ) STRICT;
    INSERT INTO due SELECT speculator, number FROM versions UNION SELECT name, 0 FROM speculators;
    CREATE INDEX transitions_by_version ON transitions (speculator, number, id);
    """,
    # What won is told from what was only pinned, and when. It used to be the order of numbers that said who won last:
    # so no version is given an older win than one of a smaller number.
    """
    ALTER TABLE versions ADD COLUMN proven_ms INTEGER NOT NULL DEFAULT 0;
    CREATE TEMP VIEW wins AS
        SELECT speculator, number, at_ms FROM transitions WHERE after = 'Stable' AND actor = 'gate';
    UPDATE versions SET proven_ms = max(1, coalesce(
        (SELECT max(at_ms) FROM wins WHERE wins.speculator = versions.speculator AND wins.number <= versions.number),
        since_ms
    )) WHERE is_proven AND (
        EXISTS (SELECT 1 FROM wins WHERE wins.speculator = versions.speculator AND wins.number = versions.number)
        OR phase = 'Stable' AND (SELECT pinned FROM speculators WHERE name = versions.speculator) IS NULL
    );
    DROP VIEW wins;
    ALTER TABLE versions DROP COLUMN is_proven;
    CREATE UNIQUE INDEX one_canary ON versions (speculator) WHERE phase = 'Canary';
    CREATE TABLE rollouts (
        speculator TEXT PRIMARY KEY REFERENCES speculators (name),
        state TEXT NOT NULL
    ) STRICT;
    """,
    """
    ALTER TABLE speculators DROP COLUMN target_fingerprint;
    ALTER TABLE speculators DROP COLUMN draft_vocabulary_fingerprint;
    """,
    # The catalogue need not know the speculator of a salt yet: a pod may capture before there is a version.
    """
    CREATE TABLE salts (speculator TEXT PRIMARY KEY, salt BLOB NOT NULL) STRICT;
    CREATE TABLE forgotten (
        speculator TEXT NOT NULL REFERENCES speculators (name),
        tenant TEXT NOT NULL,
        at_ms INTEGER NOT NULL,
        PRIMARY KEY (speculator, tenant)
    ) STRICT;
    -- Nobody knows the tenants of earlier versions. Protobuf merges these bytes: provenance {has_more_tenants: true}.
    UPDATE versions SET manifest = CAST(manifest || x'5A025801' AS BLOB);
    INSERT OR IGNORE INTO due SELECT speculator, number FROM versions;
    """,
)
"""Released migrations are never edited; new ones are appended."""

SCHEMA = len(MIGRATIONS)
