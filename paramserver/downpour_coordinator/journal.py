"""The coordinator's memory on disk: SQLite in WAL mode, one row per job and node, written before answers leave."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterable
from typing import Any

from downpour_common.errors import ConfigError

VERSION = 1
"""Of the schema; a database of another version is refused."""

_SCHEMA = """
CREATE TABLE jobs (job TEXT PRIMARY KEY, document TEXT NOT NULL);
CREATE TABLE models (job TEXT PRIMARY KEY, document TEXT NOT NULL);
CREATE TABLE nodes (node TEXT PRIMARY KEY, document TEXT NOT NULL);
"""


class Journal:
    """Raises :class:`ConfigError` when the database cannot be used; ``sqlite3.Error`` when it cannot be written.

    ``durable``: also against a loss of power (each commit waits for the disk); a killed process loses nothing either
    way.
    """

    def __init__(self, path: str, durable: bool = True) -> None:
        try:
            with contextlib.suppress(FileExistsError):  # jobs' keys are in it, and in the files that SQLite puts beside
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            self._db = sqlite3.connect(path, isolation_level=None, timeout=5.0, check_same_thread=False)
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(f"{path}: {error}") from None
        try:
            version = self._open(durable)
        except sqlite3.OperationalError as error:
            hint = "; another coordinator uses this folder" if "locked" in str(error) else ""
            raise ConfigError(f"{path}: {error}{hint}") from None
        except sqlite3.DatabaseError as error:
            raise ConfigError(f"{path}: is no coordinator's database: {error}") from None
        if version != VERSION:
            self._db.close()
            raise ConfigError(f"{path}: has schema {version}, this version of downpour uses {VERSION}")

    def _open(self, durable: bool) -> int:
        """The version of the schema, which is made where there is none."""
        try:
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
            version = int(self._db.execute("PRAGMA user_version").fetchone()[0])
            found = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
            if found != "ok":
                raise sqlite3.DatabaseError(f"it is damaged: {found}")
            if version == 0 and self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                raise sqlite3.DatabaseError("it holds the tables of another program")
            if version == 0:
                self._db.executescript(f"BEGIN EXCLUSIVE;{_SCHEMA}PRAGMA user_version={VERSION};COMMIT;")
                version = VERSION
        except BaseException:
            self._db.close()
            raise
        return version

    def write(
        self,
        jobs: dict[str, dict[str, Any]],
        models: dict[str, dict[str, Any]],
        nodes: dict[str, dict[str, Any] | None],
    ) -> None:
        """Put these documents in place of older ones, all or none; a node that is None is forgotten."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._put("jobs", "job", jobs)
            self._put("models", "job", models)
            self._put("nodes", "node", {k: v for k, v in nodes.items() if v is not None})
            self._db.executemany("DELETE FROM nodes WHERE node=?", [(k,) for k, v in nodes.items() if v is None])
            self._db.execute("COMMIT")
        except BaseException:
            self._db.execute("ROLLBACK")
            raise

    def _put(self, table: str, key: str, documents: dict[str, dict[str, Any]]) -> None:
        rows = [(name, json.dumps(document, separators=(",", ":"))) for name, document in documents.items()]
        self._db.executemany(
            f"INSERT INTO {table} ({key}, document) VALUES (?, ?) "
            f"ON CONFLICT ({key}) DO UPDATE SET document=excluded.document",
            rows,
        )

    def jobs(self) -> Iterable[tuple[str, dict[str, Any], dict[str, Any] | None]]:
        """(job, document, its model's document or None)."""
        rows = self._db.execute(
            "SELECT jobs.job, jobs.document, models.document FROM jobs LEFT JOIN models ON jobs.job = models.job"
        ).fetchall()
        return [(job, json.loads(document), json.loads(model) if model else None) for job, document, model in rows]

    def nodes(self) -> Iterable[tuple[str, dict[str, Any]]]:
        """(node, document)."""
        rows = self._db.execute("SELECT node, document FROM nodes").fetchall()
        return [(node, json.loads(document)) for node, document in rows]

    def close(self) -> None:
        """Close the file."""
        self._db.close()
