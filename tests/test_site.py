"""The documents build as a site: every page is in its menu, and every link and anchor leads somewhere."""

import pathlib
import subprocess
import sys

from tests.commands import LONGEST

ROOT = pathlib.Path(__file__).parents[1]


def test_the_site_builds_without_a_warning(tmp_path: pathlib.Path) -> None:
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=LONGEST)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    menu = (tmp_path / "index.html").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f'href="{page.stem}/"' in menu, f"{page.name} is not in the menu of mkdocs.yml"
