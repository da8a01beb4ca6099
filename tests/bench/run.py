"""Run the benchmarks: `make bench`, or `python tests/bench/run.py --only torch_decode --quick`."""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as Screen

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# A checkout works without being installed.
sys.path[:0] = [str(HERE), str(ROOT), str(ROOT / "adapters"), str(ROOT / "examples")]

import report  # noqa: E402
from chart import draw  # noqa: E402
from measure import CLOCK, describe_machine  # noqa: E402

NAMES = report.ORDER
THREADS = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=NAMES, action="append", help="this benchmark alone; may be repeated")
    parser.add_argument("--quick", action="store_true", help="fewer runs")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "bench", help="folder for the JSON files")
    parser.add_argument("--publish", action="store_true", help="rewrite docs/performance.* and the charts")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of both frameworks")
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall", help="of the PyTorch tables")
    parser.add_argument("--worker", choices=NAMES, help=argparse.SUPPRESS)
    return parser.parse_args()


def work(name: str, *, quick: bool, out: Path) -> None:
    """Run one benchmark in this process; only PyTorch's go by another clock than the wall's."""
    if not name.startswith("torch"):
        os.environ[CLOCK] = "wall"
    load = os.getloadavg()[0]
    result = importlib.import_module(name).main(quick=quick).as_dict()
    result["measured"] = {
        "date": datetime.date.today().isoformat(),
        "threads": int(os.environ[THREADS[0]]),
        "clock": os.environ[CLOCK],
        "load": [round(load, 1), round(os.getloadavg()[0], 1)],
        "machine": describe_machine(),
    }
    (out / f"{name}.json").write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")


def show(console: Console, table: dict[str, Any]) -> None:
    """One benchmark's result on the screen."""
    screen = Screen("case", "who", "median [range]", "ours / peer", "target", title=table["title"])
    for row in table["rows"]:
        extra = ", ".join(f"{name} {report.number(value)}" for name, value in row["extra"].items())
        screen.add_row(row["case"], "ours", f"{report.spread(row['ours'])} {row['unit']}", extra, "")
        for peer, found in row["peers"].items():
            verdict = report.verdict(row, peer).replace("**", "")
            screen.add_row("", peer, report.spread(found), report.spread(row["ratios"][peer]), verdict)
    console.print(screen)


def gather(names: list[str], out: Path) -> dict[str, Any]:
    """The results in `out`."""
    return {"tables": [json.loads((out / f"{name}.json").read_text(encoding="utf-8")) for name in names]}


def main() -> int:
    """Run each benchmark in a process of its own, show and write the results."""
    chosen = options()
    chosen.out.mkdir(parents=True, exist_ok=True)
    os.environ.update(dict.fromkeys(THREADS, str(chosen.threads)))
    os.environ[CLOCK] = chosen.clock
    if chosen.worker:
        work(chosen.worker, quick=chosen.quick, out=chosen.out)
        return 0
    console, failed = Console(), list[str]()
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow", "HF_HUB_OFFLINE": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    names = list(chosen.only or NAMES)
    for name in names:
        console.rule(name)
        command = [sys.executable, __file__, "--worker", name, "--out", str(chosen.out)]
        command += ["--threads", str(chosen.threads), "--clock", chosen.clock]
        done = subprocess.run([*command, *["--quick"] * chosen.quick], env=environment, check=False)
        if done.returncode:
            failed.append(name)
        else:
            show(console, json.loads((chosen.out / f"{name}.json").read_text(encoding="utf-8")))
    finished = [name for name in names if name not in failed]
    result = gather(finished, chosen.out)
    (chosen.out / "performance.json").write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
    draw(report.in_order(result["tables"]), chosen.out)
    console.print(f"results: {chosen.out}/performance.json and charts")
    if failed:
        console.print(f"[red]failed: {', '.join(failed)}")
    elif chosen.publish:
        publish(result)
    return len(failed)


def publish(result: dict[str, Any]) -> None:
    """Put the results into docs/, in the place of the same tables of an earlier run."""
    kept: list[dict[str, Any]] = []
    if report.COMMITTED.exists():
        names = {table["name"] for table in result["tables"]}
        earlier = json.loads(report.COMMITTED.read_text(encoding="utf-8"))
        kept = [table for table in earlier["tables"] if table["name"] not in names]
    result["tables"] += kept
    report.COMMITTED.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    report.main()


if __name__ == "__main__":
    sys.exit(main())
