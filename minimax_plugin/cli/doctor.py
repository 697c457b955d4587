# SPDX-License-Identifier: Apache-2.0
"""``minimax-plugin doctor [MODEL_DIR]``: is this machine ready, and is this checkpoint complete?

Exit status 0 when nothing is at fault (warnings are allowed), 1 with one line per fault, or per kind of fault where
they are many.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any

from minimax_plugin.checkpoint import CheckpointReport, check_checkpoint
from minimax_plugin.cli.environment import Finding, check_environment
from minimax_plugin.cli.load_check import loading_faults
from minimax_plugin.side_files import TOKENIZER_FILE

_MAX_JSON_FAULTS = 1_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_dir", type=Path, nargs="?", metavar="MODEL_DIR", help="checkpoint to check")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.add_argument(
        "--skip-vllm", action="store_true", help="do not start vLLM to see whether it resolves the models (10 s)"
    )


def run(args: argparse.Namespace) -> int:
    # Names in a damaged checkpoint may hold anything; a terminal that cannot show a character must not stop the doctor.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    findings = check_environment(probe_vllm=not args.skip_vllm)
    faults = sum(finding.level == "fault" for finding in findings)
    report = None
    if args.model_dir is not None:
        report = check_checkpoint(args.model_dir)
        report.faults.extend(loading_faults(report))
        findings += checkpoint_findings(report)
        faults += report.num_faults
    if args.json:
        print(json.dumps(as_json(findings, report), indent=2))
    else:
        for finding in findings:
            print(f"{finding.level:8}{finding.topic:13}{finding.message}")
        print(f"{faults:,} fault(s)" if faults else "no faults")
    return 1 if faults else 0


def checkpoint_findings(report: CheckpointReport) -> list[Finding]:
    """The checkpoint's faults and notes, or one line that says what was found complete."""
    findings = [Finding("fault", "checkpoint", line) for line in report.lines()]
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
        if not (report.directory / TOKENIZER_FILE).is_file():
            findings.append(
                Finding("warning", "checkpoint", f"{TOKENIZER_FILE}: no such file; the model answers token ids only")
            )
    return findings


def as_json(findings: list[Finding], report: CheckpointReport | None) -> dict[str, Any]:
    """The result as a JSON object: ``ok``, ``findings`` and, with a model directory, ``checkpoint``.

    ``checkpoint.faults`` holds the first 1,000 faults, ``checkpoint.num_faults`` counts all of them.
    """
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
            "num_faults": report.num_faults,
            "faults": [
                {"file": fault.file, "subject": fault.subject, "found": fault.found, "expected": fault.expected}
                for fault in report.faults[:_MAX_JSON_FAULTS]
            ],
        }
    return result
