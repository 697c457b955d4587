# SPDX-License-Identifier: Apache-2.0
"""``minimax-plugin doctor [MODEL_DIR]``: is this machine ready, and is this checkpoint complete?

Exit status 0 when nothing is at fault (warnings are allowed), 1 with one line per fault.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from minimax_plugin.checkpoint import CheckpointReport, check_checkpoint
from minimax_plugin.cli.environment import Finding, check_environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_dir", type=Path, nargs="?", metavar="MODEL_DIR", help="checkpoint to check")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.add_argument(
        "--skip-vllm", action="store_true", help="do not start vLLM to see whether it resolves the models (10 s)"
    )


def run(args: argparse.Namespace) -> int:
    findings = check_environment(probe_vllm=not args.skip_vllm)
    report = None
    if args.model_dir is not None:
        report = check_checkpoint(args.model_dir)
        findings += checkpoint_findings(report)
    faults = sum(finding.level == "fault" for finding in findings)
    if args.json:
        print(json.dumps(as_json(findings, report), indent=2))
    else:
        for finding in findings:
            print(f"{finding.level:8}{finding.topic:13}{finding.message}")
        print(f"{faults} fault(s)" if faults else "no faults")
    return 1 if faults else 0


def checkpoint_findings(report: CheckpointReport) -> list[Finding]:
    """The checkpoint's faults and notes, or one line that says what was found complete."""
    findings = [Finding("fault", "checkpoint", str(fault)) for fault in report.faults]
    findings += [Finding("warning", "checkpoint", note) for note in report.notes]
    if report.complete:
        findings.append(
            Finding(
                "ok",
                "checkpoint",
                f"{report.num_tensors:,} tensors, {report.total_size:,} bytes in {report.num_files} file(s), as "
                "config.json and the index say",
            )
        )
        if not (report.directory / "tokenizer.json").is_file():
            findings.append(
                Finding("warning", "checkpoint", "tokenizer.json: no such file; the model answers token ids only")
            )
    return findings


def as_json(findings: list[Finding], report: CheckpointReport | None) -> dict[str, Any]:
    """The result as a JSON object: ``ok``, ``findings`` and, with a model directory, ``checkpoint``."""
    result: dict[str, Any] = {
        "ok": all(finding.level != "fault" for finding in findings),
        "findings": [finding._asdict() for finding in findings],
    }
    if report is not None:
        result["checkpoint"] = {
            "directory": str(report.directory),
            "complete": report.complete,
            "files": report.num_files,
            "tensors": report.num_tensors,
            "bytes": report.total_size,
            "parameters": report.architecture.num_parameters if report.architecture else None,
            "faults": [
                {"file": fault.file, "subject": fault.subject, "found": fault.found, "expected": fault.expected}
                for fault in report.faults
            ],
        }
    return result
