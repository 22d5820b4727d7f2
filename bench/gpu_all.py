# SPDX-License-Identifier: Apache-2.0
"""All parts of bench/kernels/gpu.py, each in a process of its own, within a budget of time.

    python -m bench.gpu_all [--out DIR] [--minutes 30] [--parts reference,graphs] [--dry-run]

Parts come in the order of what must be known first: wrong numbers make times worthless. Each gets an equal share of
the time that is left, and eight minutes at most. One that crashes or hangs does not stop the next. DIR holds a PNG for
each part but `sanitizer`, and `gpu_all.json` with what the parts' files hold and how each ended; of a part that was
ended, with what it had by then.

Exit codes: 0 ok, 1 a part failed or was ended, 2 bad usage, 3 nothing failed and there was no time for something.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.kernels.gpu import LEFT_OUT, MINUTES, PARTS
from bench.records import ROOT, hide_paths

#: Below this a part has no time to begin.
FEWEST_MINUTES = 1.0
#: What a part may take beyond its time before it is ended: a compilation under way.
GRACE_SECONDS = 60.0
#: Parts without a plot here: a machine that is lent gives back eight files at most, and these count errors only.
UNDRAWN = ("sanitizer",)
#: Arms that a line names of those that were left out; the file has all.
NAMED = 5


def run_all(parts: Sequence[str], out: Path, minutes: float, is_dry_run: bool = False) -> dict[str, dict[str, Any]]:
    """Run parts; {part: {"exit_code" (None: ended; LEFT_OUT also where it had no time), "seconds", "note", and its
    file's content}}."""
    end = time.monotonic() + 60 * minutes
    ended: dict[str, dict[str, Any]] = {}
    out.mkdir(parents=True, exist_ok=True)
    for place, part in enumerate(parts):
        share = min(MINUTES, (end - time.monotonic()) / 60 / (len(parts) - place))
        if share < FEWEST_MINUTES:
            ended[part] = {"exit_code": LEFT_OUT, "seconds": 0.0, "note": f"no time left of {minutes:g} minutes"}
        else:
            ended[part] = _run(part, out, share, is_dry_run)
        print(f"{part}: {ended[part]['note']}", file=sys.stderr, flush=True)
        # After every part: this process may be ended, too.
        (out / "gpu_all.json").write_text(json.dumps(ended, indent=1) + "\n", encoding="utf-8")
    return ended


def _run(part: str, out: Path, minutes: float, is_dry_run: bool) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.kernels.gpu", "--part", part, "--out", str(out.resolve())]
    command += ["--minutes", f"{minutes:.2f}", *(["--dry-run"] if is_dry_run else [])]
    path = out / f"gpu_{part}.json"
    # Of an earlier run.
    path.unlink(missing_ok=True)
    start = time.monotonic()
    code: int | None = None
    note = ""
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=60 * minutes + GRACE_SECONDS, check=False
        )
        code, said = done.returncode, done.stderr
        if code not in (0, LEFT_OUT):
            note = hide_paths(said.strip()[-2000:])
    except subprocess.TimeoutExpired:
        note = f"ended after {minutes:.1f} minutes and {GRACE_SECONDS:.0f} s"
    content = {}
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
        # Kept in gpu_all.json: a machine may give back few files.
        path.unlink()
    if part in UNDRAWN:
        path.with_suffix(".png").unlink(missing_ok=True)
    if code is None:
        note += f", with {len(content.get('records', []))} records"
    if left_out := content.get("left_out"):
        note = "; ".join(filter(None, [note, _describe_left_out(left_out)]))
    return {"exit_code": code, "seconds": round(time.monotonic() - start, 1), "note": note or "ok", **content}


def _describe_left_out(arms: Sequence[str]) -> str:
    more = f" and {len(arms) - NAMED} more" if len(arms) > NAMED else ""
    return f"no time for {', '.join(arms[:NAMED])}{more}"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_all", description="All parts of bench/kernels/gpu.py.")
    parser.add_argument("--out", type=Path, default=Path("gpu_results"), metavar="DIR")
    parser.add_argument("--minutes", type=float, default=30.0, help="for all parts together")
    parser.add_argument("--parts", default=",".join(PARTS), metavar="PART,...")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes in the interpreter, on a CPU")
    options = parser.parse_args(argv)
    parts = options.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"{unknown[0]!r} is none of {', '.join(PARTS)}")
    ended = run_all(parts, options.out, options.minutes, options.dry_run)
    print(options.out / "gpu_all.json")
    codes = {one["exit_code"] for one in ended.values()}
    if codes - {0, LEFT_OUT}:
        return 1
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
