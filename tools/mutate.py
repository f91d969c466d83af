# SPDX-License-Identifier: Apache-2.0
"""Plant one-line mistakes in a scratch copy of the sources, one at a time, and see which the tests notice.

    python tools/mutate.py [--only TEXT] [--from N] [--to N] [--tests "api load"] [--scratch DIR] [--list]

The copy holds what git tracks, builds its extension once and then incrementally, and is what the tests import. For each
of tools/mutations.py it prints "killed" and the test, "survived", or "stale" where the sources no longer hold the text.
--tests runs those files instead of the mistake's own ("all": the whole suite in Python; "csrc": the C test program);
--from and --to count from 1. Exit status: 1 if a mistake survived or is stale. By hand: it takes half a minute for
each. docs/internals.md has the table.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mutations import MISTAKES, Mistake

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {"csrc": (".c", ".h", ".inc"), "gemma4": (".py",)}
TIMEOUT_S = 900
C_TESTS = "csrc"  # among the names of a mistake's tests: csrc_test, which runs after the tests in Python
# Python finds the copy's package even where an editable install of another one would come first.
SITE = """\
import sys
sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "ScikitBuildRedirectingFinder"]
"""


class Stale(Exception):
    """The sources do not hold a mistake's text exactly once."""


def source_files(root: Path) -> list[Path]:
    """What mistakes are planted in: everything but tests."""
    tests = root / "csrc" / "tests"
    files = [
        path for folder, endings in SOURCES.items() for path in (root / folder).rglob("*") if path.suffix in endings
    ]
    return sorted(path for path in files if tests not in path.parents)


def place_of(mistake: Mistake, root: Path) -> Path:
    """The file that holds the mistake's text. Raises Stale."""
    found = [(path, path.read_text().count(mistake.old)) for path in source_files(root)]
    holders = [(path, n) for path, n in found if n]
    if len(holders) != 1 or holders[0][1] != 1:
        where = ", ".join(f"{path.relative_to(root)} ({n})" for path, n in holders) or "nowhere"
        raise Stale(f"the text stands {where}, not once: {mistake.old[:60]!r}")
    return holders[0][0]


def test_files(names: str, root: Path) -> list[str]:
    """Paths of the Python tests named as in mutations.py. Raises Stale if there is no such file."""
    if names == "all":
        return ["tests"]
    paths = []
    for name in names.split():
        folder, _, stem = name.rpartition("/")
        if name != C_TESTS:
            paths.append(str(Path("tests", folder, f"test_{stem}.py")))
    missing = [path for path in paths if not (root / path).is_file()]
    if missing:
        raise Stale(f"there is no {', '.join(missing)}")
    return paths


@contextmanager
def planted(mistake: Mistake, root: Path) -> Iterator[None]:
    """The mistake in its file, which afterwards is as it was."""
    path = place_of(mistake, root)
    right = path.read_text()
    path.write_text(right.replace(mistake.old, mistake.new))
    try:
        yield
    finally:
        path.write_text(right)


class Copy:
    """A scratch copy of what git tracks, with an extension of its own."""

    def __init__(self, folder: Path) -> None:
        self.root, self.build_folder = folder / "source", folder / "build"
        self.environment = os.environ | {"PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}

    def fill(self) -> None:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
        names = {name for name in listed.stdout.split("\0") if (ROOT / name).is_file()}
        for path in source_files(self.root):  # of an earlier run
            if path.relative_to(self.root).as_posix() not in names:
                path.unlink()
        for name in sorted(names):
            source, target = ROOT / name, self.root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if not (target.is_file() and filecmp.cmp(source, target, shallow=False)):
                shutil.copyfile(source, target)  # what is the same already is not compiled again
        (self.root / "sitecustomize.py").write_text(SITE)
        # -O1: the mistakes are the same, and a kernel compiles in seconds
        options = [
            "-DCMAKE_BUILD_TYPE=None",
            "-DCMAKE_C_FLAGS=-O1 -DG4_NO_INLINING",
            "-DGEMMA4_TESTS=ON",
            f"-DPython_EXECUTABLE={sys.executable}",
        ]
        self._run(["cmake", "-S", self.root, "-B", self.build_folder, *options])
        self.build()

    def build(self) -> None:
        """Raises CalledProcessError if the sources do not compile."""
        self._build("_engine")
        [built] = self.build_folder.glob("_engine*.so")
        shutil.copyfile(built, self.root / "gemma4" / built.name)

    def _build(self, target: str) -> None:
        self._run(["cmake", "--build", self.build_folder, "--target", target, "--parallel"])

    def _run(self, command: list[str | Path]) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stdout[-2000:], done.stderr[-2000:], file=sys.stderr)
            done.check_returncode()

    def first_failure(self, names: str) -> str | None:
        """The first test that fails, or how the run died; None if all pass. Raises Stale if a test is missing."""
        paths, failure = test_files(names, self.root), None
        if paths:
            pytest = [sys.executable, "-P", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--no-header"]
            failure = self._failure([*pytest, *paths], r"^(?:FAILED|ERROR) (\S+)")
        if failure is None and C_TESTS in names.split():
            self._build("csrc_test")
            failure = self._failure([str(self.build_folder / "csrc_test")], r"^\S*?(csrc/tests/\S+): failed: ")
        return failure

    def _failure(self, command: list[str], pattern: str) -> str | None:
        """What `pattern` finds in the output of a command that fails, or how it died."""
        try:
            done = subprocess.run(
                command,
                cwd=self.root,
                env=self.environment,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"no end after {TIMEOUT_S} s"
        if done.returncode == 0:
            return None
        failed = re.search(pattern, done.stdout, flags=re.MULTILINE)
        return failed[1] if failed else f"exit status {done.returncode}"


def verdict(mistake: Mistake, copy: Copy, tests: str | None) -> tuple[str, str]:
    """ "killed", "survived" or "stale", and by which test or why."""
    try:
        with planted(mistake, copy.root):
            copy.build()  # also takes the mistake before this one out of the extension
            failure = copy.first_failure(tests or mistake.tests)
    except Stale as reason:
        return "stale", str(reason)
    except subprocess.CalledProcessError:
        return "stale", "the mistake does not compile"
    return ("survived", "") if failure is None else ("killed", failure)


def chosen(args: argparse.Namespace) -> list[tuple[int, Mistake]]:
    numbered = list(enumerate(MISTAKES, 1))[args.first - 1 : args.last]
    return [(n, mistake) for n, mistake in numbered if args.only in mistake.what]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="mistakes whose description holds this")
    parser.add_argument("--from", dest="first", type=int, default=1, metavar="N")
    parser.add_argument("--to", dest="last", type=int, default=len(MISTAKES), metavar="N")
    parser.add_argument("--tests", metavar="NAMES", help='test files instead of the mistakes\' own, or "all"')
    parser.add_argument(
        "--scratch", type=Path, metavar="DIR", help="keep the copy here, for the next run to go on with"
    )
    parser.add_argument("--list", action="store_true", help="say where each would be planted, and stop")
    args = parser.parse_args()
    if args.list:
        for n, mistake in chosen(args):
            try:
                print(f"{n:3} {place_of(mistake, ROOT).relative_to(ROOT)}: {mistake.what}")
            except Stale as reason:
                print(f"{n:3} stale: {mistake.what}: {reason}")
        return 0
    counts = {"killed": 0, "survived": 0, "stale": 0}
    with tempfile.TemporaryDirectory() as scratch:
        copy = Copy((args.scratch or Path(scratch)).absolute())
        copy.fill()
        if failure := copy.first_failure(args.tests or "api"):
            raise SystemExit(f"the tests fail without any mistake: {failure}")
        for n, mistake in chosen(args):
            start = time.monotonic()
            result, why = verdict(mistake, copy, args.tests)
            counts[result] += 1
            print(f"{n:3} {result:8} {time.monotonic() - start:4.0f} s  {mistake.what}: {why}", flush=True)
    print(", ".join(f"{count} {result}" for result, count in counts.items()))
    return 1 if counts["survived"] or counts["stale"] else 0


if __name__ == "__main__":
    sys.exit(main())
