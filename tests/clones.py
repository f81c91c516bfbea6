"""git in the repositories that tests make."""

import subprocess
from pathlib import Path

IDENTITY = ("-c", "user.name=Test", "-c", "user.email=test@localhost")


def git(folder: Path, *arguments: str) -> str:
    """Run git in a folder and return what it printed."""
    return subprocess.run(
        ["git", "-C", folder, *IDENTITY, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def commit_all(folder: Path) -> None:
    """Make a repository of a folder's files."""
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "first")
