"""Where twins are, on disk, for who must reach them when their broker is dead."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from federation.errors import Reason, ScenarioError


@dataclass(frozen=True, slots=True, order=True)
class Post:
    """A twin's name, its address (`host:port`), and its domain."""

    name: str
    address: str
    domain: str


def write_roster(file: Path, posts: Iterable[Post]) -> None:
    """Replace the file in one go, so that a reader never sees half of it."""
    new = file.with_name(file.name + ".new")
    with new.open("w", encoding="utf-8") as out:
        json.dump([asdict(post) for post in sorted(posts)], out, indent=1)
    new.replace(file)


def read_roster(file: Path) -> tuple[Post, ...]:
    """Fails with MISSING_FILE, and with STORE_FAILED when it makes no sense."""
    if not file.is_file():
        raise ScenarioError(
            Reason.MISSING_FILE,
            f"there is no roster {file}; a broker writes one beside its store",
            {"file": str(file)},
        )
    try:
        return tuple(Post(**each) for each in json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ScenarioError(
            Reason.STORE_FAILED, f"{file} is no roster: {error}", {"file": str(file)}
        ) from error


class Roster:
    """Keeps a file up to date with who is there.

    A twin that was lost stays on it, since it may only be lost to the broker; one that has left
    is taken off.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        try:
            self._posts = {post.name: post for post in read_roster(file)}
        except ScenarioError:
            self._posts = {}

    def note(self, present: Iterable[Post], left: Iterable[str] = ()) -> None:
        posts = {**self._posts, **{post.name: post for post in present}}
        for name in left:
            posts.pop(name, None)
        if posts != self._posts or not self._file.is_file():
            write_roster(self._file, posts.values())
            self._posts = posts
