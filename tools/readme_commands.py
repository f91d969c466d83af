# SPDX-License-Identifier: Apache-2.0
"""Print one of the commands that README.md promises to work, so that CI runs what users read.

    python tools/readme_commands.py run        the first: install and show the shipped model
    python tools/readme_commands.py test       the second: install the test extra and run every test

In README.md each is a fenced block below a comment: `<!-- command: run -->`.
"""

import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCK = re.compile(r"^<!-- command: (\w+) -->\n+```\w*\n(.*?)\n```$", re.MULTILINE | re.DOTALL)


def commands(readme: str) -> dict[str, str]:
    """name -> command, for every marked block of the text."""
    return {name: command.strip() for name, command in BLOCK.findall(readme)}


def main() -> int:
    found = commands(README.read_text())
    name = sys.argv[1] if len(sys.argv) == 2 else ""
    if name not in found:
        print(f"usage: readme_commands.py NAME, where {README.name} has {', '.join(found) or 'none'}", file=sys.stderr)
        return 2
    print(found[name])
    return 0


if __name__ == "__main__":
    sys.exit(main())
