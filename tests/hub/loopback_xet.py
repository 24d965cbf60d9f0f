"""The content-addressed store behind the Hub's large files: what the xet client sends, and asks back.

The client cuts files into chunks and uploads *xorbs* (many chunks in a row) and *shards* (which chunks make up which
file). Here xorbs are kept as they come; a shard is parsed for its files, and a download is answered with the byte
ranges of the xorbs that hold its chunks.
"""

import struct
from dataclasses import dataclass, field

RECORD = 48
HASH = 32
BOOKEND = b"\xff" * HASH
WITH_VERIFICATION, WITH_METADATA = 1 << 31, 1 << 30
CHUNK_HEADER = 8


def hex_of(digest: bytes) -> str:
    """A hash as the client writes it: four little-endian words."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", digest))


@dataclass(frozen=True)
class Term:
    """Chunks `start` to `end` of a xorb."""

    xorb: str
    start: int
    end: int
    length: int


@dataclass
class XetStore:
    xorbs: dict[str, bytes] = field(default_factory=dict)
    files: dict[str, list[Term]] = field(default_factory=dict)
    by_sha256: dict[str, str] = field(default_factory=dict)

    def add_xorb(self, name: str, content: bytes) -> bool:
        return self.xorbs.setdefault(name, content) is content

    def add_shard(self, shard: bytes) -> None:
        """Reads the file section of a shard: a header of 48 bytes, then a header and its records for each file."""
        at = RECORD
        while shard[at : at + HASH] != BOOKEND:
            file = hex_of(shard[at : at + HASH])
            flags, count = struct.unpack_from("<II", shard, at + HASH)
            at += RECORD
            terms = []
            for _ in range(count):
                length, start, end = struct.unpack_from("<III", shard, at + HASH + 4)
                terms.append(Term(hex_of(shard[at : at + HASH]), start, end, length))
                at += RECORD
            self.files[file] = terms
            if flags & WITH_VERIFICATION:
                at += RECORD * count
            if flags & WITH_METADATA:
                self.by_sha256[hex_of(shard[at : at + HASH])] = file
                at += RECORD

    def size(self, file: str) -> int:
        return sum(term.length for term in self.files[file])

    def reconstruction(self, file: str, first: int, last: int | None, url: str) -> dict | None:
        """How to put bytes `first` to `last` of a file together; None where the file ends before."""
        terms, fetch, at, offset = [], {}, 0, None
        end = self.size(file) if last is None else last + 1
        for term in self.files[file]:
            begins, at = at, at + term.length
            if at <= first or begins >= end:
                continue
            # Whole terms: the client cuts what it did not ask for off the first one, and off the last.
            offset = first - begins if offset is None else offset
            chunks = {"start": term.start, "end": term.end}
            terms.append({"hash": term.xorb, "unpacked_length": term.length, "range": chunks})
            low, high = self._bytes(term)
            part = {"range": chunks, "url": f"{url}/{term.xorb}", "url_range": {"start": low, "end": high}}
            if part not in fetch.setdefault(term.xorb, []):
                fetch[term.xorb].append(part)
        return None if offset is None else {"offset_into_first_range": offset, "terms": terms, "fetch_info": fetch}

    def _bytes(self, term: Term) -> tuple[int, int]:
        """First and last byte of a term's chunks, each of which follows a header with its compressed length."""
        xorb, at, starts = self.xorbs[term.xorb], 0, []
        for _ in range(term.end):
            starts.append(at)
            at += CHUNK_HEADER + int.from_bytes(xorb[at + 1 : at + 4], "little")
        return starts[term.start], at - 1
