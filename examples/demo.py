"""One real language model in two frameworks, with and without a K/V cache: the same answers, sooner.

Run `python examples/demo.py --help`, or `make demo`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")  # must stand before Keras is imported
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import typer
from rich.console import Console

from demo_prompts import QUESTIONS, SYSTEM
from demo_run import MODES, TITLES, Answer, Engine, Point
from demo_show import chart, streamer, table, verdicts
from smollm2 import Checkpoint, load_checkpoint

BLOCK_SIZE = 16


class Framework(str, Enum):
    torch = "torch"
    keras = "keras"


def main(
    framework: Annotated[Framework | None, typer.Option(help="Only this framework; both by default.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A question of your own; may be repeated.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder, GGUF file or hub name of a Llama model.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, the same in every mode.")] = 16,
    json_path: Annotated[str | None, typer.Option("--json", help="Write all figures there; - for stdout.")] = None,
    chart_path: Annotated[Path, typer.Option("--chart", help="Where the chart goes.")] = Path("demo.png"),
    short: Annotated[bool, typer.Option("--short", help="One question, few tokens: for CI.")] = False,
) -> None:
    """Answer questions that share a long system prompt: without a cache, with it, and again with it warm."""
    console = Console(stderr=json_path == "-")
    began = time.perf_counter()
    for path in (chart_path, *([Path(json_path)] if json_path not in (None, "-") else [])):
        path.parent.mkdir(parents=True, exist_ok=True)  # now, not when all is computed
    questions = (prompt or QUESTIONS)[: 1 if short else None]
    max_new_tokens = min(max_new_tokens, 4) if short else max_new_tokens
    contexts = (64, 128) if short else (64, 128, 256, 512, 1024)
    try:
        with console.status("Reading the model"):
            checkpoint = load_checkpoint(model)
    except (OSError, ImportError, ValueError) as error:
        console.print(f"[bold red]{error}")
        raise typer.Exit(2) from error
    prompts = {question: checkpoint.chat(SYSTEM, question) for question in questions}
    console.print(f"[bold]{checkpoint.name}[/], read in {time.perf_counter() - began:.1f} s.")
    shared = [len(set(column)) == 1 for column in zip(*prompts.values(), strict=False)]
    for number, (question, tokens) in enumerate(prompts.items(), 1):
        console.print(f"  {number}. {question} [dim]({len(tokens)} tokens in all)[/]", highlight=False)
    if len(prompts) > 1:
        console.print(
            f"  Each stands behind the same system prompt: the first {[*shared, False].index(False)} tokens are equal."
        )
    console.print()

    names = [framework.value] if framework else list(TITLES)
    answers: list[Answer] = []
    points: list[Point] = []
    for name in names:
        engine = start(console, name, checkpoint, blocks_for(prompts.values(), max_new_tokens, contexts))
        answers += converse(console, engine, prompts, max_new_tokens)
        points += measure(console, engine, contexts, steps=4 if short else 8)

    chart(points, checkpoint.name, chart_path)
    results = verdicts(answers)
    for held, text in results:
        console.print(f"[bold {'green' if held else 'red'}]{'✓' if held else '✗'}[/] {text}")
    seconds = time.perf_counter() - began
    console.print(f"Chart: {chart_path}. The whole demo took {seconds:.0f} s.")
    if json_path:
        report = {
            "model": checkpoint.name,
            "questions": questions,
            "max_new_tokens": max_new_tokens,
            "equal": all(held for held, _ in results),
            "verdicts": [text for _, text in results],
            "answers": [asdict(answer) for answer in answers],
            "ms_per_new_token": [asdict(point) for point in points],
            "seconds": seconds,
        }
        write_json(json_path, report)
    raise typer.Exit(0 if all(held for held, _ in results) else 1)


def blocks_for(prompts: Any, max_new_tokens: int, contexts: Sequence[int]) -> int:
    """Blocks that hold every conversation and the chart's longest context at once, were nothing shared."""
    tokens = [len(prompt) + max_new_tokens for prompt in prompts] + [max(contexts) + 32]
    return sum(-(-count // BLOCK_SIZE) + 1 for count in tokens)


def start(console: Console, name: str, checkpoint: Checkpoint, size: int) -> Engine:
    """Load the model into a framework and run it once."""
    with console.status(f"{TITLES[name]}: loading the model and running it once") as status:
        began = time.perf_counter()
        engine = Engine(name, checkpoint, size)
        loaded = time.perf_counter()
        status.update(f"{TITLES[name]}: running the model once")
        engine.warm_up()
    first = time.perf_counter() - loaded
    console.rule(f"[bold]{TITLES[name]}[/] (imported and loaded in {loaded - began:.1f} s, first runs {first:.1f} s)")
    return engine


def converse(console: Console, engine: Engine, prompts: dict[str, list[int]], max_new_tokens: int) -> list[Answer]:
    """Ask every question in every mode."""
    answers = []
    for mode in MODES:
        console.print(f"[bold]{engine.title}, {mode}[/]")
        for number, (question, prompt) in enumerate(prompts.items(), 1):
            console.print(f"  {number}. ", end="", highlight=False)
            answers.append(engine.ask(mode, question, prompt, max_new_tokens, streamer(console)))
            console.print(f"  [dim]{answers[-1].seconds:.1f} s[/]", highlight=False)
    console.print()
    console.print(table(engine, answers))
    return answers


def measure(console: Console, engine: Engine, contexts: Sequence[int], steps: int) -> list[Point]:
    """The chart's points."""
    filler = engine.checkpoint.tokenizer.encode(SYSTEM).ids
    tokens = (filler * (max(contexts) // len(filler) + 1))[: max(contexts)]
    points: list[Point] = []
    with console.status("") as status:
        for point in engine.curve(tokens, contexts, steps):
            points.append(point)
            status.update(f"{engine.title}: the chart, context {point.context}")
    for cached in (False, True):
        line = ", ".join(f"{p.ms:.0f} at {p.context}" for p in points if p.cached == cached)
        console.print(f"ms per new token {'with' if cached else 'without'} cache: {line} tokens", highlight=False)
    console.print()
    return points


def write_json(path: str, report: dict[str, Any]) -> None:
    """Write the figures to a file, or to standard output for "-"."""
    text = json.dumps(report, indent=2)
    if path == "-":
        print(text)
    else:
        Path(path).write_text(text + "\n")


if __name__ == "__main__":
    typer.run(main)
