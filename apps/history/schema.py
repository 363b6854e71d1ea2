"""The tables of a history file, and migrations from older files.

``PRAGMA user_version`` is the number of ``MIGRATIONS`` that have been applied to a file.  The
full-text index is optional: without FTS5 or its trigrams, a search reads all messages.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

MIGRATIONS = (
    """
    CREATE TABLE conversations (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        title TEXT NOT NULL,
        system_prompt TEXT NOT NULL DEFAULT '',
        options TEXT NOT NULL DEFAULT '{}',
        leaf INTEGER,
        created REAL NOT NULL,
        updated REAL NOT NULL
    );
    CREATE TABLE messages (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        conversation INTEGER NOT NULL REFERENCES conversations(id) ON DELETE CASCADE,
        parent INTEGER REFERENCES messages(id) ON DELETE CASCADE,
        role TEXT NOT NULL CHECK (role IN ('user', 'assistant')),
        text TEXT NOT NULL DEFAULT '',
        groups TEXT NOT NULL DEFAULT '',
        state TEXT NOT NULL,
        stats TEXT NOT NULL DEFAULT '{}',
        model TEXT NOT NULL DEFAULT '',
        created REAL NOT NULL
    );
    CREATE INDEX messages_by_conversation ON messages(conversation);
    CREATE INDEX messages_by_parent ON messages(parent);
    CREATE INDEX conversations_by_time ON conversations(updated);
    CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    """,
)
_INDEX = """
    CREATE VIRTUAL TABLE message_index
        USING fts5(text, content='messages', content_rowid='id', tokenize='trigram');
    CREATE TRIGGER index_new AFTER INSERT ON messages WHEN new.state != 'streaming' BEGIN
        INSERT INTO message_index(rowid, text) VALUES (new.id, new.text);
    END;
    CREATE TRIGGER index_finished AFTER UPDATE OF state ON messages
        WHEN old.state = 'streaming' AND new.state != 'streaming' BEGIN
        INSERT INTO message_index(rowid, text) VALUES (new.id, new.text);
    END;
    CREATE TRIGGER index_gone AFTER DELETE ON messages WHEN old.state != 'streaming' BEGIN
        INSERT INTO message_index(message_index, rowid, text) VALUES ('delete', old.id, old.text);
    END;
    INSERT INTO message_index(rowid, text) SELECT id, text FROM messages WHERE state != 'streaming';
"""
BUSY_S = 5.0


def connect(path: Path) -> sqlite3.Connection:
    """Open a history file; create it if it is missing, and migrate it if it is old.

    The connection is in autocommit mode; only one thread at a time may use it.

    Raises:
        ValueError: the file is not a history, is damaged, or was written by a newer version.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    connection = sqlite3.connect(
        path, timeout=BUSY_S, isolation_level=None, check_same_thread=False
    )
    try:
        path.chmod(0o600)
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA foreign_keys = ON")
        _migrate(connection, path)
    except sqlite3.DatabaseError as error:
        connection.close()
        raise ValueError(f"cannot read {path} as a conversation history: {error}") from None
    except BaseException:
        connection.close()
        raise
    return connection


def has_index(connection: sqlite3.Connection) -> bool:
    """Return whether the file has a full-text index."""
    rows = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'message_index'")
    return rows.fetchone() is not None


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > len(MIGRATIONS):
        raise ValueError(f"{path} was written by a newer version of mlx-mtp")
    for number in range(version, len(MIGRATIONS)):
        script = f"{MIGRATIONS[number]} PRAGMA user_version = {number + 1};"
        _run(connection, script)
    if not has_index(connection):
        try:
            _run(connection, _INDEX)
        except sqlite3.OperationalError:  # SQLite without FTS5 or its trigrams
            connection.rollback()


def _run(connection: sqlite3.Connection, script: str) -> None:
    """Run a script as one transaction: after a kill, all of it or nothing is applied."""
    connection.executescript(f"BEGIN IMMEDIATE; {script} COMMIT;")
