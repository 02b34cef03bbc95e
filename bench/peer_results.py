"""Hold the rows of bench/peers.py, on disk after every shape; a run may go on from those of one that was killed."""

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path

import checkout  # noqa: F401
import tables
from tables import Row

# Of a key: where and with what. kernels is a digest of their sources, which may be changed without a commit; tuned, of
# what bench/tune.py has found for them.
SAME = ("device", "torch", "triton", "kernels", "tuned", "quick", "commit")


@dataclass(frozen=True)
class Key:
    """What the rows of interleaved rounds have in common, named as their fields."""

    shape: str
    tokens: int
    hidden: int
    ffn_per_rank: int
    activation: str
    dtype: str
    mode: str
    run: str
    l2: str
    device: str
    torch: str
    triton: str
    kernels: str
    tuned: str | None
    quick: bool
    commit: str | None

    @classmethod
    def of(cls, row: Row) -> "Key":
        """Return a row's key. Raises: KeyError, TypeError: it is no row of this benchmark."""
        whole: Row = {"tuned": None} | row  # older rows lack it
        return cls(**{field.name: whole[field.name] for field in fields(cls)})

    def __str__(self) -> str:
        l2 = f", L2 {self.l2}" if self.l2 in ("cold", "warm") else ""
        return f"{self.shape}, {self.activation}, {self.dtype}, {self.mode}, {self.run}{l2}"


class Results:
    """Rows by key, written to path as JSON and, flattened, as CSV whenever rows are added; None: not written."""

    def __init__(self, json_path: Path | None, csv_path: Path | None) -> None:
        self.json_path, self.csv_path = json_path, csv_path
        self.by_key: dict[Key, list[Row]] = {}

    def resume(self) -> None:
        """Take the rows that the JSON has; none where there is no file. Raises: ValueError: it holds something else."""
        assert self.json_path is not None
        if not self.json_path.exists():
            return
        try:
            rows = json.loads(self.json_path.read_text(encoding="utf-8"))
            keys = [Key.of(row) for row in rows]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"--resume: {self.json_path} has no rows of this benchmark ({error!r})") from None
        for key, row in zip(keys, rows, strict=True):
            self.by_key.setdefault(key, []).append(row)

    def peers(self, key: Key) -> list[str]:
        """Return the peers that have a row, or a full one where it need not be; none without a commit, which could be
        any."""
        rows = self.by_key.get(key) or self.by_key.get(replace(key, quick=False), [])
        return [] if key.commit is None else [row["impl"] for row in rows]

    def add(self, rows: list[Row]) -> None:
        """Add the rows of a shape, in the place of those measured before on this device, and write all."""
        measured: dict[Key, list[Row]] = {}
        for row in rows:
            measured.setdefault(Key.of(row), []).append(row)
        for key in measured:
            now = {name: getattr(key, name) for name in SAME if name != "device"}
            for other in [k for k in self.by_key if replace(k, **now) == key]:
                del self.by_key[other]
        self.by_key |= measured
        self.write()

    def rows(self) -> list[Row]:
        """Return all rows."""
        return [row for rows in self.by_key.values() for row in rows]

    def write(self) -> None:
        """Write all rows to the files."""
        if self.json_path is not None:
            tables.write_json(self.rows(), self.json_path)
        if self.csv_path is not None:
            tables.write_csv([_flat(row) for row in self.rows()], self.csv_path)


def _flat(row: Row) -> Row:
    return {name: json.dumps(value) if isinstance(value, dict) else value for name, value in row.items()}
