"""Command that checks the machine and the installation: doctor."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ddiff.runs.doctor.findings import Finding


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check the machine and the installation, and say how to fix what does not work.

    Checked are torch, devices, threads, memory, folders, caches, plugins, optional packages and the
    exchange between processes. The exit code is 1 if there is a problem, else 0.
    """
    from ddiff.runs.doctor.examination import examine

    findings = examine()
    problems = sum(finding.state == "problem" for finding in findings)
    if as_json:
        found = [finding.to_dict() for finding in findings]
        typer.echo(json.dumps({"problems": problems, "findings": found}, indent=2))
    else:
        _print_findings(findings)
    raise typer.Exit(1 if problems else 0)


def _print_findings(findings: Sequence[Finding]) -> None:
    """Print a line per finding, and its remedy below."""
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        typer.echo(f"{finding.state:7}  {finding.name:{width}}  {finding.meaning}")
        if finding.remedy:
            typer.echo(f"{'':7}  {'':{width}}  -> {finding.remedy}")
    counts = dict.fromkeys(("ok", "note", "problem"), 0)
    for finding in findings:
        counts[finding.state] += 1
    typer.echo(f"\n{counts['problem']} problems, {counts['note']} notes, {counts['ok']} ok")
