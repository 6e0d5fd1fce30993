"""`labkit dashboard`: W&B's shared workspace and a report of the claims, made from code.

Both are found again by their names, and what people changed in them stays: only sections that are
missing are added to the workspace, and only the table of claims is replaced in the report. That
needs wandb-workspaces 0.4, which writes back all that it has read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from labkit import record
from labkit.show import SIGNS
from labkit.wandb_log import login

TITLE = "labkit: claims"
HEAD = "## What the runs say about the claims"
WORKSPACE = "labkitshared"  # in its address, ?nw=labkitshared
SECTIONS = {
    "Training": ("loss", "tokens_per_second", "learning_rate"),
    "Preferences": ("reward", "kl", "margin", "gold"),
}


def update(project: str = "labkit", entity: str = "", root: Path | None = None) -> tuple[str, str]:
    """Creates or updates both; returns the addresses of the workspace and of the report.

    Raises ValueError without wandb-workspaces or a login.
    """
    try:
        import wandb
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        remedy = "pip install wandb-workspaces==0.4.13"
        raise ValueError(f"wandb-workspaces is missing: {remedy}") from error
    login()
    api = wandb.Api()
    entity = entity or api.default_entity
    report = _report(reports, api, project, entity, claims_table(record.read_runs(root)))
    try:  # of the address, only the two names and the view count
        view = workspaces.Workspace.from_url(f"https://w/{entity}/{project}?nw={WORKSPACE}")
    except ValueError:  # there is none yet
        view = workspaces.Workspace(entity, project, name="labkit", auto_generate_panels=True)
        view._internal_name = f"nw-{WORKSPACE}-v"
    known = {section.name for section in view.sections}
    for title in (title for title in SECTIONS if title not in known):
        plots = [reports.LinePlot(x="step", y=[f"train/{name}"]) for name in SECTIONS[title]]
        view.sections.append(workspaces.Section(title, panels=plots, is_open=True))
    return view.save().url, report


def _report(reports: Any, api: Any, project: str, entity: str, claims: str) -> str:
    found = [r for r in api.reports(f"{entity}/{project}") if r.display_name == TITLE]
    if found:
        report = reports.Report.from_url(found[0].url)
        own = [HEAD in getattr(block, "text", "") for block in report.blocks]
        place = own.index(True) if True in own else 0
        report.blocks = [b for b, mine in zip(report.blocks, own, strict=True) if not mine]
        report.blocks.insert(place, reports.MarkdownBlock(claims))
    else:
        runs = reports.Runset(entity, project, groupby=["group"])  # seeds: mean and deviation
        plots = [reports.LinePlot(x="step", y=[f"train/{n}"]) for n in SECTIONS["Training"][:2]]
        blocks = [reports.MarkdownBlock(claims), reports.PanelGrid(runsets=[runs], panels=plots)]
        report = reports.Report(project, entity, TITLE, blocks=blocks)
    return report.save().url


def claims_table(runs: list[dict[str, Any]]) -> str:
    """The claims of the newest finished run of each notebook, as a table in Markdown."""
    newest = {run["notebook"]: run for run in runs if run["status"] == "finished" and run["claims"]}
    lines = [HEAD, "", "| # | verdict | claim | measured | run |", "|---|---|---|---|---|"]
    claims = [(claim, run) for run in newest.values() for claim in run["claims"]]
    for claim, run in sorted(claims, key=lambda pair: pair[0]["number"]):
        verdict = f"{SIGNS.get(claim['verdict'], '?')} {claim['verdict']}"
        cells = (claim["number"], verdict, claim["claim"], claim["value"], run["id"])
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    """A value as text in a table of Markdown, in which nothing is markup."""
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;")
    for sign in "\\`*_[]|":
        text = text.replace(sign, f"\\{sign}")
    return text
