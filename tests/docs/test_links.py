"""Links between pages of the repository lead to files and to headings."""

from __future__ import annotations

from pathlib import Path

import pytest
from markdown_links import ROOT, find_markdown_files, make_anchor, read_anchors, read_links

PAGES = find_markdown_files()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_of_page_lead_to_files_and_headings(page: Path) -> None:
    for target, anchor in read_links(page):
        assert target.exists(), f"{page.name}: there is no {target.relative_to(ROOT)}"
        if anchor and target.suffix == ".md":
            assert anchor in read_anchors(target), f"{page.name}: no #{anchor} in {target.name}"


def test_pages_have_links_with_anchors_to_check() -> None:
    anchors = [anchor for page in PAGES for _, anchor in read_links(page) if anchor]
    assert len(anchors) > 50


def test_anchor_keeps_letters_digits_and_hyphens_of_heading() -> None:
    assert make_anchor("Time rules (`core/times.py`)") == "time-rules-coretimespy"
    assert make_anchor("Wrong parents, xi < 1") == "wrong-parents-xi--1"
